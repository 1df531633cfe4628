"""Dropping tokens in one pruning layer, and refilling them later: where the recoveries of the config meet.

It knows tensors and a config, nothing of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from atedm.choices import BY_MATCH, Own
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
    mean_by_source,
    similarity_copy,
    update_of_match,
    weighted_update,
    with_own_update,
    zero_padding,
)
from atedm.token_ranking import Ranking, check_shape


@dataclass(frozen=True)
class ToRefill:
    """What a recovery of one's own is given: see docs/extending.md."""

    #: (B, K, C): the kept tokens after the last layer.
    kept: Tensor
    #: (B, K, C): the same as they went on from the pruning point.
    start: Tensor
    #: (B, N, C): all tokens at the pruning point.
    before: Tensor
    #: (B, K) int64, ascending: which were kept.
    keep: Tensor
    #: (h, w) of the grid, N = h w, where there is one.
    size: tuple[int, int]


class Choice(NamedTuple):
    """Which tokens go on and who refills the others: all that pruning decides, and what can outlast a step."""

    #: (B, N) float32.
    importance: Tensor
    #: (B, K) int64, ascending: the tokens that go on.
    keep: Tensor
    #: (B, N) int64 places within K: whom each token is refilled from, where it is from one other.
    source: Tensor | None = None
    #: (B, K) float32: how many tokens of the grid each kept one stands for, where that is asked for.
    gathered: Tensor | None = None
    #: (B, N, K): how much of each update a token takes, where it takes from all.
    weights: Tensor | None = None


@dataclass(frozen=True)
class Dropped:
    """What is remembered of one pruning layer until its tokens are refilled."""

    #: (B, K) int64, ascending: the tokens that went on.
    keep: Tensor
    #: Gives (B, N, C) from the kept tokens (B, K, C) after the last layer.
    refill: Callable[[Tensor], Tensor]
    #: (B, K) float32: how many tokens of the grid each of them stands for, where attention is to know.
    weights: Tensor | None = None


@dataclass
class Updates:
    """The last update of every token of a block, for recoveries that go by it: read, and replaced at each refill."""

    #: (B, N, C), None before the first refill.
    last: Tensor | None = None
    #: Whether it was replaced in this step.
    is_new: bool = False


@torch.no_grad()  # who is kept and whom a token is like has no gradient, and the product need not wait for one
def choose_tokens(
    tokens: Tensor,
    ranking: Ranking,
    count: int,
    size: tuple[int, int],
    config: PruningConfig,
    weights: Tensor | None = None,
) -> Choice:
    """Keep the ``count`` most important tokens, and find who refills the others.

    Args:
        tokens: (B, N, C) at the pruning point.
        ranking: From `rank_tokens`.
        count: K.
        size: (h, w) of the grid if N = h w; only what goes by places needs it.
        config: The pruning config.
        weights: (B, N), how many tokens of the grid each stands for; None is one each.
    """
    choice = Choice(ranking.importance, keep_most_important(ranking.importance, count))
    return match_tokens(tokens, choice, ranking, size, config, weights)


@torch.no_grad()
def match_tokens(
    tokens: Tensor,
    choice: Choice,
    ranking: Ranking | None,
    size: tuple[int, int],
    config: PruningConfig,
    weights: Tensor | None = None,
) -> Choice:
    """Find who refills the tokens that a choice drops.

    Args:
        tokens: As `choose_tokens`.
        choice: Of which ``keep`` matters.
        ranking: For configs that copy by attention.
        size: As `choose_tokens`.
        config: As `choose_tokens`.
        weights: As `choose_tokens`.
    """
    keep = choice.keep
    if config.recovery == "weighted-update":
        if config.similarity == "distance":
            return choice._replace(weights=distance_weights(keep, size))
        return choice._replace(weights=attention_weights(_map_to_copy_by(ranking, config), keep))
    if config.recovery not in BY_MATCH:
        return choice
    source = _source(tokens, ranking, keep, size, config)
    if not (config.proportional_attention or config.merge):
        return choice._replace(source=source)
    each = _one_each(tokens) if weights is None else weights
    gathered = each.new_zeros(keep.shape).scatter_add(1, source, each)
    return choice._replace(source=source, gathered=gathered)


def drop_tokens(
    tokens: Tensor,
    choice: Choice,
    size: tuple[int, int],
    config: PruningConfig,
    weights: Tensor | None = None,
    updates: Updates | None = None,
) -> tuple[Tensor, Dropped]:
    """Take the tokens of a choice, and prepare to refill the others.

    Args:
        tokens: (B, N, C) at the pruning point.
        choice: From `choose_tokens`, in this step or an earlier one.
        size: (h, w) of the grid.
        config: The pruning config.
        weights: As `choose_tokens`.
        updates: Those of the last step, for configs that remember them.

    Returns:
        The kept tokens (B, K, C) in raster order, and what refills the rest.
    """
    kept = gather_tokens(tokens, choice.keep)
    if config.merge:
        assert choice.source is not None
        assert choice.gathered is not None
        each = _one_each(tokens) if weights is None else weights
        kept = mean_by_source(tokens, choice.source, each, choice.gathered)
    refill = _refill(tokens, kept, choice, size, config, updates)
    return kept, Dropped(choice.keep, refill, choice.gathered if config.proportional_attention else None)


def _one_each(tokens: Tensor) -> Tensor:
    """(B, N) of ones in float32, whatever torch's default: 16 bits do not hold the number of an image's tokens."""
    return torch.ones(tokens.shape[:2], dtype=torch.float32, device=tokens.device)


def _refill(
    tokens: Tensor,
    start: Tensor,
    choice: Choice,
    size: tuple[int, int],
    config: PruningConfig,
    updates: Updates | None,
) -> Callable[[Tensor], Tensor]:
    keep, source = choice.keep, choice.source
    if callable(config.recovery):
        return partial(_by_own_recovery, start=start, before=tokens, keep=keep, size=size, recovery=config.recovery)
    if config.recovery == "weighted-update":
        assert choice.weights is not None
        return partial(weighted_update, keep=keep, before=tokens, weights=choice.weights)
    if config.recovery == "direct-copy":
        return partial(direct_copy, keep=keep, before=tokens)
    if config.recovery == "bicubic":
        return partial(bicubic_interpolation, keep=keep, size=size)
    if config.recovery == "zero-padding":
        return partial(zero_padding, keep=keep, tokens=tokens.shape[1])
    assert source is not None
    if config.recovery == "similarity-copy":
        return partial(similarity_copy, source=source)
    if config.remembers_updates and updates is not None:
        return partial(_by_own_update, start=start, before=tokens, choice=choice, config=config, updates=updates)
    return partial(matched_update, start=start, before=tokens, source=source)


def _by_own_recovery(
    kept: Tensor, start: Tensor, before: Tensor, keep: Tensor, size: tuple[int, int], recovery: Own
) -> Tensor:
    filled: Tensor = recovery(ToRefill(kept, start, before, keep, size))
    check_shape(filled, (*before.shape[:2], kept.shape[2]), "recovery", recovery)
    return filled.to(kept.dtype)


def _by_own_update(
    kept_tokens: Tensor, start: Tensor, before: Tensor, choice: Choice, config: PruningConfig, updates: Updates
) -> Tensor:
    """Refill by the update of the match and by the own update of the step before, which is replaced."""
    assert choice.source is not None
    update = update_of_match(kept_tokens, start, choice.source)
    last = updates.last
    if last is not None and last.shape == update.shape:
        if config.recovery == "last-update":
            kept_updates = gather_tokens(update, choice.keep)
            update = direct_copy(kept_updates, choice.keep, last.to(update.dtype))
        else:
            update = with_own_update(update, last, choice.source, choice.keep.shape[1], config.own_update_share)
    updates.last, updates.is_new = update.detach().to(kept_tokens.dtype), True
    return (before.to(update.dtype) + update).to(kept_tokens.dtype)


def _source(
    tokens: Tensor, ranking: Ranking | None, keep: Tensor, size: tuple[int, int], config: PruningConfig
) -> Tensor:
    """Whom each token is refilled from, (B, N) places within ``keep``; a map it went by is free again after."""
    if config.matches_by_features:
        return match_by_features(tokens, keep, config.similarity, window=config.match_window, size=size).source
    if config.similarity == "distance":
        return nearest_source(keep, size)
    if ranking is not None and ranking.source is not None:
        source = ranking.source(keep)
        if callable(config.map_mode):
            check_shape(source, tokens.shape[:2], "the source of map_mode", config.map_mode)
        return source
    return attention_source(_map_to_copy_by(ranking, config), keep)


def _map_to_copy_by(ranking: Ranking | None, config: PruningConfig) -> Tensor:
    assert ranking is not None
    assert ranking.attention_map is not None
    return ranking.attention_map.mT if config.similarity == "attention-transposed" else ranking.attention_map
