"""One pruning layer, start to end: rank, keep, drop, and later refill.

This is where the parts of the method meet. It knows tensors and a config, nothing of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

from torch import Tensor

from atedm.attention_map import mean_attention_map
from atedm.config import PruningConfig
from atedm.pruning import gather_tokens, keep_most_important
from atedm.ranking import (
    Mapping,
    attention_received,
    entropy,
    hard_clip,
    power,
    rank_by_attention,
    soft_clip,
    uniform_random,
)
from atedm.recovery import (
    attention_source,
    bicubic_interpolation,
    cosine_source,
    direct_copy,
    similarity_copy,
    zero_padding,
)


class QueriesAndKeys(NamedTuple):
    """What an attention layer compares: ``q`` (B, H, M, D), ``k`` (B, H, N, D), and the factor on their product."""

    q: Tensor
    k: Tensor
    scale: float


#: Makes the queries and keys when they are first needed, because some configs never do.
Attention: TypeAlias = Callable[[], QueriesAndKeys]


class Ranking(NamedTuple):
    """``importance`` (B, N) float32, and the head-mean self-attention map (B, N, N) where the config needs it."""

    importance: Tensor
    attention_map: Tensor | None


def rank_tokens(
    config: PruningConfig, tokens: Tensor, self_attention: Attention, cross_attention: Attention, step: int | Tensor = 0
) -> Ranking:
    """Rank the tokens of one block as ``config.ranking`` says, and its batch as ``config.guidance_masks`` says.

    Args:
        config: The pruning config.
        tokens: (B, N, C); only their number and device matter.
        self_attention: Makes q and k of the layer's self-attention.
        cross_attention: Makes q and k of its cross-attention.
        step: Index of the denoising step, for the random ranking alone; a tensor without dimensions is as good.

    Returns:
        The `Ranking`; the map is None unless ``config.needs_attention_map``.

    Raises:
        ValueError: If the halves of an odd batch are to share what they keep.
    """
    ranking = _rank_each(config, tokens, self_attention, cross_attention, step)
    if config.guidance_masks == "shared":
        return ranking._replace(importance=shared_importance(ranking.importance))
    return ranking


def shared_importance(importance: Tensor) -> Tensor:
    """Mean importance (B, N) of the two halves of a batch, for both, so that an image keeps the same tokens in both.

    Raises:
        ValueError: If B is odd.
    """
    if importance.shape[0] % 2:
        raise ValueError(
            f"guidance_masks='shared' needs a batch of two halves, without and with the prompt, but it has "
            f"{importance.shape[0]}; turn guidance on (guidance_scale above 1), or use guidance_masks='separate'"
        )
    without_prompt, with_prompt = importance.chunk(2)
    return ((without_prompt + with_prompt) / 2).repeat(2, 1)


def _rank_each(
    config: PruningConfig, tokens: Tensor, self_attention: Attention, cross_attention: Attention, step: int | Tensor
) -> Ranking:
    rank = partial(
        rank_by_attention, head_fusion=config.head_fusion, iterations=config.iterations, tolerance=config.tolerance
    )
    if config.ranking.startswith("self-attention"):
        ranked = rank(*self_attention())
        is_reversed = config.ranking.endswith("-reversed")
        return Ranking(-ranked.importance if is_reversed else ranked.importance, ranked.attention_map)
    attention_map = mean_attention_map(*self_attention()) if config.needs_attention_map else None
    if config.ranking == "attention-received":
        assert attention_map is not None
        return Ranking(attention_received(attention_map), attention_map)
    if config.ranking == "uniform-random":
        batch, count, _ = tokens.shape
        random = uniform_random(batch, count, seed=config.seed, step=step, device=tokens.device)  # type: ignore[arg-type]
        return Ranking(random, attention_map)
    ranked = rank(*cross_attention(), f=_mapping(config))
    return Ranking(ranked.importance, attention_map)


def _mapping(config: PruningConfig) -> Mapping:
    """Return the mapping f(A, s_K) of a cross-attention ranking, with its constants filled in."""
    mappings: dict[str, Mapping] = {
        "cross-attention-entropy": entropy,
        "cross-attention-hard-clip": partial(hard_clip, eta=config.eta),
        "cross-attention-soft-clip": partial(soft_clip, eta=config.eta),
        "cross-attention-power": partial(power, alpha=config.alpha, beta=config.beta),
    }
    return mappings[config.ranking]


@dataclass(frozen=True)
class Dropped:
    """What is remembered of one pruning layer until its tokens are refilled."""

    #: (B, K) int64, ascending: the tokens that went on.
    keep: Tensor
    #: Gives (B, N, C) from the kept tokens (B, K, C) after the last layer.
    refill: Callable[[Tensor], Tensor]


def drop_tokens(
    tokens: Tensor, ranking: Ranking, count: int, size: tuple[int, int], config: PruningConfig
) -> tuple[Tensor, Dropped]:
    """Keep the ``count`` most important tokens, and prepare to refill the others.

    Args:
        tokens: (B, N, C) at the pruning point.
        ranking: From `rank_tokens`.
        count: K.
        size: (h, w) of the grid if N = h w; only bicubic interpolation needs it.
        config: The pruning config.

    Returns:
        The kept tokens (B, K, C) in raster order, and what refills the rest.
    """
    keep = keep_most_important(ranking.importance, count)
    return gather_tokens(tokens, keep), Dropped(keep, _refill(tokens, ranking, keep, size, config))


def _refill(
    tokens: Tensor, ranking: Ranking, keep: Tensor, size: tuple[int, int], config: PruningConfig
) -> Callable[[Tensor], Tensor]:
    if config.recovery == "similarity-copy":
        if config.similarity == "cosine":
            source = cosine_source(tokens, keep)
        else:
            assert ranking.attention_map is not None
            is_transposed = config.similarity == "attention-transposed"
            source = attention_source(ranking.attention_map.mT if is_transposed else ranking.attention_map, keep)
        return partial(similarity_copy, source=source)  # the map itself is free again here
    if config.recovery == "direct-copy":
        return partial(direct_copy, keep=keep, before=tokens)
    if config.recovery == "bicubic":
        return partial(bicubic_interpolation, keep=keep, size=size)
    return partial(zero_padding, keep=keep, tokens=tokens.shape[1])
