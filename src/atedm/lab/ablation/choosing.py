"""Ranking, choosing, dropping and refilling by the names of a `Variant`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from atedm.lab.ablation import controls
from atedm.lab.ablation.map_modes import scores_by
from atedm.lab.ablation.mappings import MAPPINGS
from atedm.lab.ablation.recoveries import bicubic_interpolation, zero_padding
from atedm.lab.ablation.settings import Settings
from atedm.method.attention_map import mean_attention_map
from atedm.method.contract import Cut, View
from atedm.method.cover import lattice, representative
from atedm.method.gwpr import rank_by_attention
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.matching import match_by_features
from atedm.method.protection import with_protected
from atedm.method.recovery import (
    direct_copy,
    group_sizes,
    mean_by_source,
    similarity_copy,
    update_of_match,
    with_own_update,
)

_BY_SELF_ATTENTION = ("self-attention", "self-attention-reversed", "important-of-cells")
_BY_MATCH = ("similarity-copy", "matched-update")


class Ranking(NamedTuple):
    """How the tokens rank, and whom to copy from by attention."""

    importance: Tensor  #: (B, N) float32.
    #: Gives (B, N) int64 places within ``keep`` (B, K); None where no copy goes by attention.
    source: Callable[[Tensor], Tensor] | None = None


class Choice(NamedTuple):
    """Which tokens go on and who refills the others: what can outlast a step."""

    importance: Tensor  #: (B, N) float32.
    keep: Tensor  #: (B, K) int64, ascending.
    source: Tensor | None = None  #: (B, N) int64 places within K; None for refills that go by no match.


@dataclass(frozen=True)
class Remembered:
    """What a block hands to its next step."""

    updates: Tensor | None = None  #: (B, N, C): the last update of every token.
    choices: dict[int, Choice] | None = None  #: By layer.
    age: int = 0  #: Steps since the choices were made.


@torch.no_grad()  # who is kept and whom a token is like has no gradient
def rank_tokens(settings: Settings, view: View) -> Ranking:
    """Rank ``view.tokens`` as ``settings.rank`` says."""
    copies = settings.refill in _BY_MATCH and settings.match == "attention"
    ranks = settings.rank in _BY_SELF_ATTENTION
    scores = None
    if copies or ranks:
        scores = scores_by(
            settings.map_mode,
            view,
            head_fusion=settings.head_fusion,
            iterations=settings.iterations if ranks else 0,
            rows=settings.sampled_rows,
        )
    by_attention = None if scores is None else scores.importance
    importance = with_protected(_importance(settings, view, by_attention), view.protected)
    return Ranking(importance, scores.source if copies and scores is not None else None)


def _importance(settings: Settings, view: View, by_attention: Tensor | None) -> Tensor:
    tokens, rank = view.tokens, settings.rank
    batch, number, _ = tokens.shape
    if settings.ranks_by_words:
        f = MAPPINGS[rank.removeprefix("cross-attention-")]
        return rank_by_attention(*view.cross_attention(), f=f, iterations=settings.iterations).importance
    if rank == "attention-received":
        return controls.attention_received(mean_attention_map(*view.self_attention()))
    if rank == "uniform-random":
        return controls.uniform_random(batch, number, seed=0, step=view.step, device=tokens.device)
    if rank == "facility-location":
        return controls.facility_location(tokens, view.count)
    if rank == "cells":
        return controls.cells(view.size, step=view.step, device=tokens.device).expand(batch, -1)
    if rank in ("lattice", "representative"):
        cover = lattice(view.size, step=view.step, device=tokens.device).expand(batch, -1)
        if rank == "lattice":
            return cover
        return representative(_features(settings, tokens), cover, view.count, settings.cover_share)
    assert by_attention is not None
    if rank == "important-of-cells":
        return controls.important_of_cells(by_attention, view.size)
    return -by_attention if rank.endswith("-reversed") else by_attention


@torch.no_grad()
def choose(settings: Settings, view: View, ranking: Ranking) -> Choice:
    """Keep the ``view.count`` most important tokens, and find who refills the others."""
    keep = keep_most_important(ranking.importance, view.count)
    source = None
    if settings.refill in _BY_MATCH:
        by_attention = ranking.source
        features = _features(settings, view.tokens)
        source = by_attention(keep) if by_attention else match_by_features(features, keep).source
    return Choice(ranking.importance, keep, source)


def _features(settings: Settings, tokens: Tensor) -> Tensor:
    """What is compared: the nearest of normalised tokens is that of the largest cosine."""
    return functional.normalize(tokens.float(), dim=-1) if settings.match == "cosine" else tokens


def drop(settings: Settings, view: View, choice: Choice) -> Cut:
    """Take the tokens of a choice, made in this step or an earlier one, and prepare to refill the others."""
    tokens, keep, source = view.tokens, choice.keep, choice.source
    sizes = None if source is None else group_sizes(source, keep.shape[1])
    start = gather_tokens(tokens, keep)
    if settings.merge:
        assert source is not None
        assert sizes is not None
        start = mean_by_source(tokens, source, sizes)
    weights = sizes if settings.counts else None
    return Cut(start, keep, choice.importance, _refill(settings, view, start, choice), weights)


def _refill(settings: Settings, view: View, start: Tensor, choice: Choice) -> Callable[[Tensor], Tensor]:
    tokens, keep, source = view.tokens, choice.keep, choice.source
    if settings.refill == "zero-padding":
        return partial(zero_padding, keep=keep, tokens=tokens.shape[1])
    if settings.refill == "direct-copy":
        return partial(direct_copy, keep=keep, before=tokens)
    if settings.refill == "bicubic":
        return partial(bicubic_interpolation, keep=keep, size=view.size)
    assert source is not None
    if settings.refill == "similarity-copy":
        return partial(similarity_copy, source=source)
    return partial(_matched_update, settings, view, start, source)


def _matched_update(settings: Settings, view: View, start: Tensor, source: Tensor, kept: Tensor) -> Tensor:
    """Own value plus the update of the match, and a share of the own update of the step before."""
    update = update_of_match(kept, start, source)
    memory = view.memory if settings.own_update_share > 0 else None
    if memory is not None:
        remembered = memory.last if isinstance(memory.last, Remembered) else Remembered()
        if remembered.updates is not None and remembered.updates.shape == update.shape:
            update = with_own_update(update, remembered.updates, source, kept.shape[1], settings.own_update_share)
        memory.store(Remembered(update.detach().to(kept.dtype), remembered.choices, remembered.age))
    return (view.tokens.to(update.dtype) + update).to(kept.dtype)
