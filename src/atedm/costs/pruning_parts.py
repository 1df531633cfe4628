"""The parts of pruning, one after another: get the map, rank, mask, drop, fill (supplement Fig. 4).

Done by the package's own functions, and told apart. The way to the attention map is the one that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from atedm.attention_map import empty_map, maps_in_turn
from atedm.config import PruningConfig
from atedm.costs.stopwatch import free_memory
from atedm.matching import attention_source
from atedm.patching.pruning_layer import queries_and_keys
from atedm.patching.summary import PatchSummary
from atedm.pruning import gather_tokens, keep_most_important
from atedm.ranking import RankedMap, gwpr, root_mean_square
from atedm.recovery import similarity_copy
from atedm.schedule import prune_less_steps
from atedm.token_ranking import QueriesAndKeys, rank_tokens

PARTS = ("get map", "rank", "mask", "drop", "fill")
"""The bars of supplement Fig. 4."""

Rank: TypeAlias = Callable[[Tensor], Tensor]
"""Importance (..., N) of maps (..., N, N)."""

Lap: TypeAlias = Callable[[str], None]
"""Says that what was done since the last lap belongs to a part."""


# --- Ways to the attention map ----------------------------------------------------------------------------------------


def head_by_head(attention: QueriesAndKeys, rank: Rank, lap: Lap) -> RankedMap:
    """Rank by one head's map at a time, as `rank_by_attention` does: the package's way."""
    mean_map = empty_map(attention.q, attention.k)
    per_head = []
    for a in maps_in_turn(*attention):
        mean_map.add_(a, alpha=1 / attention.q.shape[1])
        lap("get map")
        per_head.append(rank(a))
        lap("rank")
        del a  # or it lives on while the next head is computed
    importance = root_mean_square(torch.stack(per_head))
    lap("rank")
    return RankedMap(importance, mean_map)


def all_heads(attention: QueriesAndKeys, rank: Rank, lap: Lap) -> RankedMap:
    """Rank by the maps of all heads at once, (B, H, N, N): one product, one softmax, and the memory for them."""
    q, k, scale = attention
    maps = torch.softmax((scale * q) @ k.mT, dim=-1, dtype=torch.float32)
    mean_map = maps.mean(1)
    lap("get map")
    importance = root_mean_square(rank(maps).transpose(0, 1))
    lap("rank")
    del maps
    lap("get map")  # giving that much memory back takes a while too
    return RankedMap(importance, mean_map)


MAP_WAYS: dict[str, Callable[[QueriesAndKeys, Rank, Lap], RankedMap]] = {
    "head-by-head": head_by_head,
    "all-heads": all_heads,
}
"""By name. Each gives what `rank_by_attention` gives and laps "get map" and "rank"."""

WITHOUT_MAP = ("blocked", "flash", "triton", "sampled")
"""Modes of `atedm.map_modes` that never hold the map: "get map" is all of the ranking, "fill" making rows once more."""

WAYS = (*MAP_WAYS, *WITHOUT_MAP)
"""Everything that is timed."""

_HOLDS_ALL = frozenset({"all-heads"})


def why_not(way: str, shapes: Sequence[PrunedShape], batch: int, dtype: torch.dtype, device: torch.device) -> str:
    """Say why a way has to be passed over: it does not run here, or takes more than a third of the free memory.

    Counted are the product of all heads in ``dtype`` and its softmax in float32; the rest is left to what else wants
    memory.

    Args:
        way: A name in `WAYS`.
        shapes: What is to be timed.
        batch: B, images of guidance counted.
        dtype: Of the model.
        device: Where it is.

    Returns:
        The reason, or "" if there is none.
    """
    if way == "triton" and device.type != "cuda":
        return "its kernels run on CUDA"
    if way == "flash" and device.type not in ("cpu", "cuda"):
        return f"torch has no fused attention with log-sum-exps on {device.type}"
    if way not in _HOLDS_ALL:
        return ""
    for shape in shapes:
        needed = batch * shape.heads * shape.tokens**2 * (4 + dtype.itemsize)
        free = free_memory(device)
        if needed > free / 3:
            return (
                f"the maps of {shape.heads} heads of {shape.tokens} tokens take {needed / 2**30:.1f} GiB, more than a "
                f"third of the {free / 2**30:.1f} GiB free"
            )
    return ""


# --- One block --------------------------------------------------------------------------------------------------------


class PrunedOnce(NamedTuple):
    """What the parts gave: for comparing with what the patch does."""

    importance: Tensor
    keep: Tensor
    kept: Tensor
    filled: Tensor


@torch.no_grad()
def prune_once(layer: Any, tokens: Tensor, count: int, config: PruningConfig, way: str, lap: Lap) -> PrunedOnce:
    """Do what pruning adds to a block, and nothing else of it.

    Args:
        layer: The pruning layer, a `BasicTransformerBlock`.
        tokens: (B, N, C) that reach it; the same stand for those after it, which only have to be of that size.
        count: K.
        config: Of the paper's kind, see `latency`.
        way: A name in `WAYS`.
        lap: Called after each part with its name in `PARTS`.
    """
    attention = partial(queries_and_keys, layer.attn1, layer.norm1, tokens)
    source: Callable[[Tensor], Tensor] | None
    if way in WITHOUT_MAP:
        importance, _, source = rank_tokens(config.replace(map_mode=way), tokens, attention, attention)
        assert source is not None
        lap("get map")
        lap("rank")  # in one with it
    else:
        rank = partial(gwpr, iterations=config.iterations)
        importance, attention_map = MAP_WAYS[way](attention(), rank, lap)
        source = partial(attention_source, attention_map)
    keep = keep_most_important(importance, count)
    lap("mask")
    kept = gather_tokens(tokens, keep)
    lap("drop")
    filled = similarity_copy(kept, source(keep))
    lap("fill")
    return PrunedOnce(importance, keep, kept, filled)


@dataclass(frozen=True)
class PrunedShape:
    """Pruned blocks of one shape."""

    tokens: int
    #: Tokens left.
    kept: int
    channels: int
    heads: int
    #: Their names.
    blocks: tuple[str, ...]
    #: How often one of them prunes in a run: blocks times steps, less the steps in which they are spared.
    times: int


def pruned_shapes(summary: PatchSummary, steps: int) -> tuple[PrunedShape, ...]:
    """Group the pruned blocks by shape, and count how often they prune in a run of ``steps`` steps."""
    less = prune_less_steps(steps, summary.config.schedule, summary.config.prune_less_share)
    groups: dict[tuple[int, int, int, int], list[str]] = {}
    for shape in summary.shapes:
        if shape.place.name in summary.pruned and summary.kept(shape) < shape.tokens:
            key = (shape.tokens, summary.kept(shape), shape.channels, shape.heads)
            groups.setdefault(key, []).append(shape.place.name)
    return tuple(
        PrunedShape(*key, tuple(names), sum(steps - less * (name in summary.spared) for name in names))
        for key, names in groups.items()
    )
