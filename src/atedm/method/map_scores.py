"""What AT-EDM wants of a self-attention map: an importance, and whom a dropped token copies from.

Fused attention makes no map, so it is made again here, in one of three ways.

- ``scores_of_map`` makes all of it, one head at a time. This is the paper to the letter.
- ``scores_in_blocks`` gives the same up to the order of sums, a few rows at a time, where memory runs out.
- ``scores_of_rows`` makes the rows of some queries only and takes them for all. Its time does not grow with N^2.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from atedm.method.attention_map import empty_map, in_range, mean_attention_map, rows_at_once, without_autocast
from atedm.method.contract import QueriesAndKeys
from atedm.method.cover import lattice
from atedm.method.gwpr import ITERATIONS, normalise, rank_by_attention, root_mean_square
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.matching import attention_source, point_to_themselves

WHOLE_MAP_TOKENS = 1024
"""Up to so many tokens the whole map is made, which takes little there; above, a sample if one is asked for."""


class Scores(NamedTuple):
    """What one way to the map gives."""

    #: (B, N) float32; None if no iteration was asked for.
    importance: Tensor | None
    #: Gives (B, N) int64 places within ``keep`` (B, K): whom each token copies from.
    source: Callable[[Tensor], Tensor]


def self_attention_scores(
    attention: QueriesAndKeys,
    *,
    sample: int | None,
    iterations: int = ITERATIONS,
    size: tuple[int, int],
    step: int | Tensor = 0,
) -> Scores:
    """Rank by G-WPR and find copy sources, in the way that suits the number of tokens and the memory there is.

    Args:
        attention: q and k, (B, H, N, D), and their scale.
        sample: How many rows stand for the map above `WHOLE_MAP_TOKENS` tokens; None always makes the whole map.
        iterations: As `atedm.method.gwpr.gwpr`; 0 where only the copy is wanted.
        size: (h, w) of the grid.
        step: Index of the denoising step, with which the sampled rows move.

    Raises:
        RuntimeError: If memory runs out even in blocks.
    """
    tokens = attention.k.shape[2]
    if sample is not None and tokens > WHOLE_MAP_TOKENS:
        spread = lattice(size, step=step, device=attention.k.device).unsqueeze(0)
        rows = keep_most_important(spread, min(sample, tokens))[0]
        return scores_of_rows(*attention, rows, iterations=iterations)
    if torch.compiler.is_compiling():  # memory is taken when the whole graph runs, so there is nothing to catch
        return scores_of_map(*attention, iterations=iterations)
    try:
        return scores_of_map(*attention, iterations=iterations)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
    # Past the handler, where nothing holds on to what the attempt had made.
    _say_once(reason)
    return scores_in_blocks(*attention, iterations=iterations)


def scores_of_map(q: Tensor, k: Tensor, scale: float, *, iterations: int = ITERATIONS) -> Scores:
    """Rank and find copy sources by the whole map; see `atedm.method.gwpr.rank_by_attention`.

    Args:
        q: Queries, (B, H, N, D), any floating dtype.
        k: Keys, (B, H, N, D).
        scale: The factor on the logits.
        iterations: As `self_attention_scores`.
    """
    if iterations:
        importance, attention_map = rank_by_attention(q, k, scale, iterations=iterations)
        return Scores(importance, functools.partial(attention_source, attention_map))
    return Scores(None, functools.partial(attention_source, mean_attention_map(q, k, scale)))


def scores_in_blocks(q: Tensor, k: Tensor, scale: float, *, iterations: int = ITERATIONS) -> Scores:
    """As `scores_of_map` up to the order of sums, a few rows of the map at a time."""
    batch, heads, tokens, _ = q.shape
    s = q.new_full((batch * heads, tokens), 1 / tokens, dtype=torch.float32)
    with without_autocast(q.device):
        for _ in range(iterations):
            received = torch.zeros_like(s).unsqueeze(1)
            for rows, a in _blocks(q, k, scale):
                received += s[:, rows].unsqueeze(1) @ a.flatten(0, 1)
            s = normalise(received.squeeze(1))
    importance = root_mean_square(torch.unflatten(s, 0, (batch, -1)).transpose(0, 1))
    return Scores(importance, functools.partial(source_in_blocks, q, k, scale))


def source_in_blocks(q: Tensor, k: Tensor, scale: float, keep: Tensor) -> Tensor:
    """As `atedm.method.matching.attention_source` on the mean map of the heads, from a few kept rows at a time.

    Args:
        q: Queries, (B, H, N, D).
        k: Keys, (B, H, N, D).
        scale: The factor on the logits.
        keep: (B, K) int64.

    Returns:
        (B, N) int64 places within ``keep``; kept tokens point to themselves.
    """
    batch, heads, tokens, _ = k.shape
    kept = gather_tokens(q.transpose(1, 2).flatten(2), keep)
    kept_queries = torch.unflatten(kept, -1, (heads, -1)).transpose(1, 2)
    most = q.new_full((batch, tokens), -1.0, dtype=torch.float32)
    source = torch.zeros(batch, tokens, dtype=torch.int64, device=q.device)
    for rows, a in _blocks(kept_queries, k, scale):
        here = a.mean(1).max(1)
        more = here.values > most  # of equal ones the first stays
        source = torch.where(more, here.indices + rows.start, source)
        most = torch.where(more, here.values, most)
    return point_to_themselves(source, keep)


def scores_of_rows(q: Tensor, k: Tensor, scale: float, rows: Tensor, *, iterations: int = ITERATIONS) -> Scores:
    """Rank by G-WPR on some rows of the map, as if they were all, and copy from those of them that are kept.

    Args:
        q: Queries, (B, H, N, D).
        k: Keys, (B, H, N, D).
        scale: The factor on the logits.
        rows: (m,) int64 into N, each once: whose rows are made.
        iterations: As `self_attention_scores`.

    Returns:
        The `Scores`. Where none of the rows is kept, all copy the first kept token.
    """
    heads = q.shape[1]
    sampled = scale * q[:, :, rows]
    mean_rows = empty_map(sampled, k)
    per_head = []
    with without_autocast(q.device):
        for q_heads, k_heads in _few_heads(sampled, k):
            a = torch.softmax(in_range(q_heads @ k_heads.mT), dim=-1, dtype=torch.float32)
            mean_rows.add_(a.sum(1), alpha=1 / heads)
            if iterations:
                per_head.append(_importance_by_rows(a, rows, iterations))
            del a  # or it lives on while the next heads are computed
    importance = root_mean_square(torch.cat(per_head, 1).transpose(0, 1)) if iterations else None
    return Scores(importance, functools.partial(_source_of_rows, mean_rows, rows))


def _source_of_rows(mean_rows: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """Whom each token copies from, of the sampled rows that are kept; ``mean_rows`` is (B, m, N)."""
    place = torch.full((len(mean_rows), mean_rows.shape[2]), -1, device=keep.device)
    place = place.scatter(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
    place_of_row = place[:, rows]
    candidates = mean_rows.masked_fill((place_of_row < 0).unsqueeze(-1), -1.0)
    found = place_of_row.gather(1, candidates.argmax(1))
    return point_to_themselves(found.clamp_min(0), keep)


def _importance_by_rows(a: Tensor, rows: Tensor, iterations: int) -> Tensor:
    """Importance (B, H, N) of all tokens by G-WPR on ``rows`` (m,) of the maps, ``a`` (B, H, m, N)."""
    maps = a.flatten(0, 1)
    s_q = maps.new_full(maps.shape[:2], 1 / maps.shape[1])
    s_k = maps.new_full(maps[:, 0].shape, 1 / maps.shape[2])
    for _ in range(iterations):
        s_k = normalise((s_q.unsqueeze(1) @ maps).squeeze(1))
        s_q = normalise(s_k[:, rows])
    return torch.unflatten(s_k, 0, a.shape[:2])


def _few_heads(q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield q (B, H, m, D) and k (B, H, N, D) by as many heads as a CPU's caches hold the maps of, elsewhere by all.

    Elsewhere starting an operation is what takes time.
    """
    batch, heads, queries, _ = q.shape
    few = q.device.type == "cpu" and not torch.compiler.is_compiling()
    step = rows_at_once(batch * queries * k.shape[2]) if few else heads
    for start in range(0, heads, step):
        yield q[:, start : start + step], k[:, start : start + step]


def _blocks(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of the maps at a time, (B, H, r, N) float32, and which they are."""
    batch, heads, queries, _ = q.shape
    step = rows_at_once(batch * heads * k.shape[2])
    q = scale * q
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        yield rows, torch.softmax(in_range(q[:, :, rows] @ k.mT), dim=-1, dtype=torch.float32)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the system had no memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger("atedm").warning(
        "no memory for whole attention maps (%s); making them in blocks, which takes less memory and more time. "
        "AtEdm(sample=256) needs neither above %d tokens.",
        reason,
        WHOLE_MAP_TOKENS,
    )
