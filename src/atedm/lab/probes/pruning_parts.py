"""The parts of AT-EDM, one after another: get the map, rank, mask, drop, fill (supplement Fig. 4).

Done by the package's own functions, and told apart. The way to the attention map is what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from atedm.hosts.attention import queries_and_keys
from atedm.lab.ablation.map_modes import scores_by
from atedm.method.attention_map import empty_map, maps_in_turn
from atedm.method.contract import Place, QueriesAndKeys, View
from atedm.method.gwpr import gwpr, root_mean_square
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.map_scores import Scores
from atedm.method.matching import attention_source
from atedm.method.recovery import similarity_copy

PARTS = ("get map", "rank", "mask", "drop", "fill")
"""The bars of supplement Fig. 4."""
WITHOUT_MAP = ("blocked", "flash", "triton", "sampled")
"""Map modes that never hold the map: "get map" is all of the ranking, "fill" makes rows once more."""
WAYS = ("head-by-head", "all-heads", *WITHOUT_MAP)
"""Ways to the attention map that are timed."""

#: Told the part that what was done since the last lap belongs to.
Lap: TypeAlias = Callable[[str], None]


def head_by_head(attention: QueriesAndKeys, iterations: int, lap: Lap) -> Scores:
    """Rank by one head's map at a time, as the package does."""
    mean_map = empty_map(attention.q, attention.k)
    per_head = []
    for a in maps_in_turn(*attention):
        mean_map.add_(a, alpha=1 / attention.q.shape[1])
        lap("get map")
        per_head.append(gwpr(a, iterations=iterations))
        lap("rank")
        del a  # or it lives on while the next head is computed
    importance = root_mean_square(torch.stack(per_head))
    lap("rank")
    return Scores(importance, partial(attention_source, mean_map))


def all_heads(attention: QueriesAndKeys, iterations: int, lap: Lap) -> Scores:
    """Rank by the maps of all heads at once, (B, H, N, N): one product, one softmax, and the memory for them."""
    q, k, scale = attention
    maps = torch.softmax((scale * q) @ k.mT, dim=-1, dtype=torch.float32)
    mean_map = maps.mean(1)
    lap("get map")
    importance = root_mean_square(gwpr(maps, iterations=iterations).transpose(0, 1))
    lap("rank")
    del maps
    lap("get map")  # giving that much memory back takes a while too
    return Scores(importance, partial(attention_source, mean_map))


class PrunedOnce(NamedTuple):
    """What the parts gave, for comparing with what the method does."""

    importance: Tensor
    keep: Tensor
    kept: Tensor
    filled: Tensor


@torch.no_grad()
def prune_once(layer: Any, tokens: Tensor, place: Place, count: int, iterations: int, way: str, lap: Lap) -> PrunedOnce:
    """Do what AT-EDM adds to a block, and nothing else of it.

    ``layer`` is the first one of the block at ``place``, ``tokens`` (B, N, C) are what reaches it, and the same stand
    for those after it, which only have to be of that size. ``count`` are kept. ``lap`` is called after each part.
    """
    attention = partial(queries_and_keys, layer.attn1, layer.norm1, tokens)
    if way in WITHOUT_MAP:
        # One row of tokens: which rows are sampled makes no difference to the time.
        view = View(place, (1, tokens.shape[1]), count, 0, tokens, attention, attention)
        scores = scores_by(way, view, head_fusion="rms", iterations=iterations, rows=256)
        lap("get map")
        lap("rank")  # in one with it
    else:
        scores = (head_by_head if way == "head-by-head" else all_heads)(attention(), iterations, lap)
    assert scores.importance is not None
    keep = keep_most_important(scores.importance, count)
    lap("mask")
    kept = gather_tokens(tokens, keep)
    lap("drop")
    filled = similarity_copy(kept, scores.source(keep))
    lap("fill")
    return PrunedOnce(scores.importance, keep, kept, filled)
