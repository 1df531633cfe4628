"""Dropping tokens in one pruning layer, and refilling them later: where the recoveries of the config meet.

It knows tensors and a config, nothing of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from atedm.config import PruningConfig
from atedm.matching import (
    attention_source,
    attention_weights,
    distance_weights,
    match_by_features,
    nearest_source,
)
from atedm.pruning import gather_tokens, keep_most_important
from atedm.recovery import (
    bicubic_interpolation,
    direct_copy,
    matched_update,
    similarity_copy,
    weighted_update,
    zero_padding,
)
from atedm.token_ranking import Ranking


@dataclass(frozen=True)
class Dropped:
    """What is remembered of one pruning layer until its tokens are refilled."""

    #: (B, K) int64, ascending: the tokens that went on.
    keep: Tensor
    #: Gives (B, N, C) from the kept tokens (B, K, C) after the last layer.
    refill: Callable[[Tensor], Tensor]
    #: (B, K) float32: how many tokens of the grid each of them stands for, where attention is to know.
    weights: Tensor | None = None


def drop_tokens(
    tokens: Tensor,
    ranking: Ranking,
    count: int,
    size: tuple[int, int],
    config: PruningConfig,
    weights: Tensor | None = None,
) -> tuple[Tensor, Dropped]:
    """Keep the ``count`` most important tokens, and prepare to refill the others.

    Args:
        tokens: (B, N, C) at the pruning point.
        ranking: From `rank_tokens`.
        count: K.
        size: (h, w) of the grid if N = h w; only what goes by places needs it.
        config: The pruning config.
        weights: (B, N), how many tokens of the grid each stands for; None is one each.

    Returns:
        The kept tokens (B, K, C) in raster order, and what refills the rest.
    """
    keep = keep_most_important(ranking.importance, count)
    kept = gather_tokens(tokens, keep)
    if config.recovery not in ("similarity-copy", "matched-update"):
        return kept, Dropped(keep, _refill(tokens, ranking, keep, size, config))
    with torch.no_grad():  # whom a token is like has no gradient, and the product need not wait for one
        source = _source(tokens, ranking, keep, size, config)
    gathered = None
    if config.proportional_attention or config.merge:
        each = torch.ones(source.shape, device=tokens.device) if weights is None else weights
        gathered = torch.zeros(keep.shape, device=tokens.device).scatter_add(1, source, each)
        if config.merge:
            kept = merged_tokens(tokens, source, each, gathered)
    if config.recovery == "similarity-copy":
        refill = partial(similarity_copy, source=source)
    else:
        refill = partial(matched_update, start=kept, before=tokens, source=source)
    return kept, Dropped(keep, refill, gathered if config.proportional_attention else None)


def merged_tokens(tokens: Tensor, source: Tensor, weights: Tensor, gathered: Tensor) -> Tensor:
    """Weighted mean of each kept token and those that match it.

    Args:
        tokens: (B, N, C).
        source: (B, N) int64 positions within K.
        weights: (B, N) float32 of the tokens.
        gathered: (B, K) float32, the sum of the weights by source.

    Returns:
        (B, K, C) in the dtype of ``tokens``, summed in float32 or better.
    """
    batch, kept = gathered.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    weighted = tokens.to(dtype) * weights.unsqueeze(-1)
    # Rows of the whole batch at once: adding row to row is many times faster than entry to entry.
    row = (source + kept * torch.arange(batch, device=source.device).unsqueeze(-1)).flatten()
    sums = weighted.new_zeros(batch * kept, tokens.shape[2]).index_add(0, row, weighted.flatten(0, 1))
    return (torch.unflatten(sums, 0, (batch, kept)) / gathered.unsqueeze(-1)).to(tokens.dtype)


def _refill(
    tokens: Tensor, ranking: Ranking, keep: Tensor, size: tuple[int, int], config: PruningConfig
) -> Callable[[Tensor], Tensor]:
    """Ways to refill that need no source."""
    if config.recovery == "weighted-update":
        if config.similarity == "distance":
            weights = distance_weights(keep, size)
        else:
            weights = attention_weights(_map_to_copy_by(ranking, config), keep)
        return partial(weighted_update, keep=keep, before=tokens, weights=weights)
    if config.recovery == "direct-copy":
        return partial(direct_copy, keep=keep, before=tokens)
    if config.recovery == "bicubic":
        return partial(bicubic_interpolation, keep=keep, size=size)
    return partial(zero_padding, keep=keep, tokens=tokens.shape[1])


def _source(tokens: Tensor, ranking: Ranking, keep: Tensor, size: tuple[int, int], config: PruningConfig) -> Tensor:
    """Whom each token is refilled from, (B, N) places within ``keep``; a map it went by is free again after."""
    if config.matches_by_features:
        return match_by_features(tokens, keep, config.similarity, window=config.match_window, size=size).source
    if config.similarity == "distance":
        return nearest_source(keep, size)
    return attention_source(_map_to_copy_by(ranking, config), keep)


def _map_to_copy_by(ranking: Ranking, config: PruningConfig) -> Tensor:
    assert ranking.attention_map is not None
    return ranking.attention_map.mT if config.similarity == "attention-transposed" else ranking.attention_map
