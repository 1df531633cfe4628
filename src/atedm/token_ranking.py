"""Ranking the tokens of one block: where the rankings of the config meet.

It knows tensors and a config, nothing of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from atedm.attention_map import mean_attention_map
from atedm.choices import Own, name_of
from atedm.config import PruningConfig
from atedm.coverage import cells, facility_location, important_of_cells, lattice, representative
from atedm.map_fallback import with_memory_there_is
from atedm.map_modes import Scores, scores_by_flash, scores_by_triton, scores_in_blocks, scores_of_rows
from atedm.pruning import keep_most_important, put_first
from atedm.ranking import (
    Mapping,
    RankedMap,
    attention_received,
    entropy,
    hard_clip,
    power,
    rank_by_attention,
    soft_clip,
    uniform_random,
)


class QueriesAndKeys(NamedTuple):
    """What an attention layer compares: ``q`` (B, H, M, D), ``k`` (B, H, N, D), and the factor on their product."""

    q: Tensor
    k: Tensor
    scale: float


#: Makes the queries and keys when they are first needed, because some configs never do.
Attention: TypeAlias = Callable[[], QueriesAndKeys]


@dataclass(frozen=True)
class ToRank:
    """What a ranking of one's own is given: see docs/extending.md."""

    #: (B, N, C) at the pruning point, any floating dtype.
    tokens: Tensor
    #: Gives q (B, H, N, D), k (B, H, N, D) and the factor on their product, when called.
    self_attention: Attention
    #: Gives q (B, H, N, D), k (B, H, words, D) and the factor, of the tokens at the pruning point, when called.
    cross_attention: Attention
    #: Index of the denoising step, from 0, a tensor without dimensions under a patch.
    step: int | Tensor
    #: (h, w) of the grid, N = h w, where there is one.
    size: tuple[int, int] | None
    #: K, how many tokens will be kept.
    count: int


class Ranking(NamedTuple):
    """How the tokens rank, and what of self-attention is left to copy by."""

    #: (B, N) float32.
    importance: Tensor
    #: The head-mean self-attention map (B, N, N), where it was made whole.
    attention_map: Tensor | None = None
    #: Else whom to copy from by it: gives (B, N) int64 places within ``keep`` (B, K).
    source: Callable[[Tensor], Tensor] | None = None


def rank_tokens(
    config: PruningConfig,
    tokens: Tensor,
    self_attention: Attention,
    cross_attention: Attention,
    *,
    step: int | Tensor = 0,
    size: tuple[int, int] | None = None,
    count: int = 1,
) -> Ranking:
    """Rank the tokens of one block as ``config.ranking`` says, and its batch as ``config.guidance_masks`` says.

    Args:
        config: The pruning config.
        tokens: (B, N, C); features matter to rankings that look for what is alike, else only number and device.
        self_attention: Makes q and k of the layer's self-attention.
        cross_attention: Makes q and k of its cross-attention.
        step: Index of the denoising step, for rankings that move with it; a tensor without dimensions is as good.
        size: (h, w) of the grid, for rankings that cover it.
        count: K, for rankings that choose with the number in mind.

    Returns:
        The `Ranking`; it has a map or a source if ``config.needs_attention_map``.

    Raises:
        ValueError: If the halves of an odd batch are to share what they keep.
    """
    ranking = _rank_each(config, tokens, self_attention, cross_attention, step, size, count)
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
    config: PruningConfig,
    tokens: Tensor,
    self_attention: Attention,
    cross_attention: Attention,
    step: int | Tensor,
    size: tuple[int, int] | None,
    count: int,
) -> Ranking:
    mode = config.map_mode_for(tokens.shape[1])
    by_attention, attention_map, source = with_memory_there_is(
        partial(_by_self_attention, config, self_attention, step, size),
        mode,
        can_be_smaller=not config.needs_whole_map,
    )
    if callable(config.ranking):
        importance = config.ranking(ToRank(tokens, self_attention, cross_attention, step, size, count))
        check_shape(importance, tokens.shape[:2], "ranking", config.ranking)
    elif config.ranks_by_words:
        importance = _rank(config)(*cross_attention(), f=_mapping(config)).importance
    elif config.ranking == "attention-received" and attention_map is not None:
        importance = attention_received(attention_map)
    elif config.ranking in ("self-attention", "self-attention-reversed", "attention-received"):
        assert by_attention is not None
        importance = -by_attention if config.ranking.endswith("-reversed") else by_attention
    else:
        importance = _covering(config, tokens, by_attention, step, size, count)
    if config.importance_share > 0:
        assert by_attention is not None
        importance = preferred(importance, by_attention, round(config.importance_share * count))
    return Ranking(importance, attention_map, source)


def _by_self_attention(
    config: PruningConfig, self_attention: Attention, step: int | Tensor, size: tuple[int, int] | None, mode: str | Own
) -> tuple[Tensor | None, Tensor | None, Callable[[Tensor], Tensor] | None]:
    """Importance (B, N) by self-attention, the map (B, N, N) and whom to copy from by it: of these what is needed."""
    if config.needs_attention_map and mode != "full":
        importance, source = _without_whole_map(config, mode, self_attention(), step, size)
        return importance, None, source
    if config.ranks_by_self_attention:
        importance, attention_map = _rank(config)(*self_attention())
        return importance, attention_map, None
    if config.needs_attention_map:
        return None, mean_attention_map(*self_attention()), None
    return None, None, None


def _rank(config: PruningConfig) -> Callable[..., RankedMap]:
    return partial(
        rank_by_attention, head_fusion=config.head_fusion, iterations=config.iterations, tolerance=config.tolerance
    )


def _without_whole_map(
    config: PruningConfig, mode: str | Own, attention: QueriesAndKeys, step: int | Tensor, size: tuple[int, int] | None
) -> Scores:
    """Rank by self-attention in one of the modes that do not hold a map."""
    fusion, iterations = config.head_fusion, config.iterations
    if not config.ranks_by_self_attention:  # what attention gives is one iteration on the mean map
        fusion, iterations = "mean-map", int(config.ranking == "attention-received")
    if callable(mode) or mode in _EXACT:
        scores_by = mode if callable(mode) else _EXACT[mode]
        scores: Scores = scores_by(*attention, head_fusion=fusion, iterations=iterations)
        if not isinstance(scores, Scores):
            raise ValueError(f"map_mode {name_of(scores_by)} must give Scores, not a {type(scores).__name__}")
        check_shape(scores.importance, attention.k.shape[:3:2], "map_mode", scores_by)
        return scores
    tokens, device = attention.k.shape[2], attention.k.device
    if size is not None and size[0] * size[1] == tokens:
        spread = lattice(size, step=step, device=device).unsqueeze(0)
    else:
        spread = uniform_random(1, tokens, seed=config.seed, step=step, device=device)
    rows = keep_most_important(spread, min(config.sampled_rows, tokens))[0]
    return scores_of_rows(*attention, rows, head_fusion=fusion, iterations=iterations)


_EXACT: dict[str, Callable[..., Scores]] = {
    "blocked": scores_in_blocks,
    "flash": scores_by_flash,
    "triton": scores_by_triton,
}


def check_shape(found: object, expected: tuple[int, ...], field: str, function: Own) -> None:
    """Raise a `ValueError` unless a function of the user's own gave a tensor of the shape that is asked of it."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(expected):
        raise ValueError(f"{field} {name_of(function)} must give a tensor of shape {tuple(expected)}, not {shape}")


def _covering(
    config: PruningConfig,
    tokens: Tensor,
    by_attention: Tensor | None,
    step: int | Tensor,
    size: tuple[int, int] | None,
    count: int,
) -> Tensor:
    """Importance (B, N) by a ranking that spreads the kept tokens, at random or on purpose."""
    batch, number, _ = tokens.shape
    if config.ranking == "uniform-random":
        return uniform_random(batch, number, seed=config.seed, step=step, device=tokens.device)
    if config.ranking == "facility-location":
        return facility_location(tokens, count)
    if size is None:
        raise ValueError(f"ranking {config.ranking!r} covers a grid, so it needs its size")
    if config.ranking == "important-of-cells":
        assert by_attention is not None
        return important_of_cells(by_attention, size)
    if config.ranking == "cells":
        return cells(size, step=step, device=tokens.device).expand(batch, -1)
    cover = lattice(size, step=step, device=tokens.device).expand(batch, -1)
    if config.ranking == "lattice":
        return cover
    by = config.similarity if config.matches_by_features else "euclidean"
    return representative(tokens, cover, count, config.cover_share, by)


def preferred(importance: Tensor, by_attention: Tensor, count: int) -> Tensor:
    """Put the ``count`` most important tokens by attention before all others, and leave the rest in their order.

    Args:
        importance: (B, N), the order of the others.
        by_attention: (B, N).
        count: From 0 to N.
    """
    if count < 1:
        return importance
    first = keep_most_important(by_attention, count)
    return put_first(importance, torch.zeros_like(importance, dtype=torch.bool).scatter(1, first, True))


def _mapping(config: PruningConfig) -> Mapping:
    """Return the mapping f(A, s_K) of a cross-attention ranking, with its constants filled in."""
    mappings: dict[str, Mapping] = {
        "cross-attention-entropy": entropy,
        "cross-attention-hard-clip": partial(hard_clip, eta=config.eta),
        "cross-attention-soft-clip": partial(soft_clip, eta=config.eta),
        "cross-attention-power": partial(power, alpha=config.alpha, beta=config.beta),
    }
    return mappings[str(config.ranking)]
