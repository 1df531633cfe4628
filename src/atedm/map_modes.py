"""Importance and copy sources by self-attention without holding a whole map.

The method wants two things of the N x N map: what G-WPR makes of it, and, once tokens are chosen, which kept query
attends most to each token. Neither needs the map all at once.

``full`` makes the map one head at a time and holds the mean of the heads. Three more give the same figures up to the
order of sums, in a memory that does not grow with N^2: ``blocked`` makes a few rows of all heads at a time, as many as
a processor's cache holds, once for each iteration of G-WPR and once more for the kept rows; ``flash`` leaves the
iterations to stock flash attention (`atedm.flash_maps`); ``triton`` has kernels of its own for all of it, on CUDA
(`atedm.triton_maps`). ``sampled`` makes the rows of some queries only and takes them for all: importance is passed from
them alone, and only those of them that are kept can be copied. Its time does not grow with N^2 either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from atedm import flash_maps, plain_maps
from atedm.attention_map import empty_map, in_range, rows_at_once, without_autocast
from atedm.matching import point_to_themselves
from atedm.pruning import gather_tokens
from atedm.ranking import ITERATIONS, normalise, root_mean_square


class Scores(NamedTuple):
    """What one way to the map gives."""

    #: (B, N) float32.
    importance: Tensor
    #: Gives (B, N) int64 places within ``keep`` (B, K): whom each token copies from.
    source: Callable[[Tensor], Tensor]


def scores_in_blocks(
    q: Tensor, k: Tensor, scale: float, *, head_fusion: str = "rms", iterations: int = ITERATIONS
) -> Scores:
    """Rank by G-WPR, and find copy sources, a few rows of the map at a time.

    Args:
        q: Queries, (B, H, N, D), any floating dtype.
        k: Keys, (B, H, N, D).
        scale: The factor on the logits.
        head_fusion: As `atedm.ranking.rank_by_attention`.
        iterations: As `atedm.ranking.gwpr`; 0 where nothing is ranked by it.

    Returns:
        The `Scores`, those of the full map up to the order of sums.
    """
    batch, heads, tokens, _ = q.shape
    maps = heads if head_fusion == "rms" else 1
    s = q.new_full((batch * maps, tokens), 1 / tokens, dtype=torch.float32)
    with without_autocast(q.device):
        for _ in range(iterations):
            received = torch.zeros_like(s).unsqueeze(1)
            for rows, a in _blocks(q, k, scale):
                received += s[:, rows].unsqueeze(1) @ _fused(a, head_fusion).flatten(0, 1)
            s = normalise(received.squeeze(1))
    return Scores(_over_heads(s, batch), lambda keep: source_in_blocks(q, k, scale, keep))


def scores_by_flash(
    q: Tensor, k: Tensor, scale: float, *, head_fusion: str = "rms", iterations: int = ITERATIONS
) -> Scores:
    """As `scores_in_blocks`, with the iterations left to stock flash attention.

    Raises:
        ValueError: If the device has none that gives log-sum-exps.
    """
    lse = flash_maps.row_lse(q, k, scale) if iterations else None
    importance = _passed_on(flash_maps.column_sums, q, k, scale, lse, head_fusion, iterations)
    return Scores(importance, lambda keep: source_in_blocks(q, k, scale, keep))


def scores_by_triton(
    q: Tensor, k: Tensor, scale: float, *, head_fusion: str = "rms", iterations: int = ITERATIONS
) -> Scores:
    """As `scores_in_blocks`, by Triton kernels. On the meta device plain products take their place, to be counted.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the tensors are not where it runs.
    """
    maps = plain_maps if q.device.type == "meta" else _triton_maps()
    lse = maps.row_lse(q, k, scale)
    importance = _passed_on(maps.column_sums, q, k, scale, lse, head_fusion, iterations)
    return Scores(importance, lambda keep: maps.copy_source(q, k, scale, lse, keep))


def _triton_maps() -> ModuleType:
    try:
        from atedm import triton_maps
    except ImportError as error:
        raise ImportError(
            "map_mode 'triton' needs the triton package, which torch for CUDA on Linux brings along; "
            "use 'auto', which picks what runs anywhere"
        ) from error
    return triton_maps


def _passed_on(
    column_sums: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    scale: float,
    lse: Tensor | None,
    head_fusion: str,
    iterations: int,
) -> Tensor:
    """Importance (B, N) by G-WPR, where a pass over the map is one call of ``column_sums``."""
    batch, heads, tokens, _ = q.shape
    s = q.new_full((batch, heads, tokens), 1 / tokens, dtype=torch.float32)
    with without_autocast(q.device):
        for _ in range(iterations):
            s = column_sums(q, k, scale, lse, s)
            s = normalise(s if head_fusion == "rms" else s.mean(1, keepdim=True).expand_as(s))
    return root_mean_square(s.transpose(0, 1))


def source_in_blocks(q: Tensor, k: Tensor, scale: float, keep: Tensor) -> Tensor:
    """As `atedm.matching.attention_source` on the mean map of the heads, from a few of the kept rows at a time.

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


def scores_of_rows(
    q: Tensor, k: Tensor, scale: float, rows: Tensor, *, head_fusion: str = "rms", iterations: int = ITERATIONS
) -> Scores:
    """Rank by G-WPR on some rows of the map, as if they were all, and copy from those of them that are kept.

    Args:
        q: Queries, (B, H, N, D).
        k: Keys, (B, H, N, D).
        scale: The factor on the logits.
        rows: (m,) int64 into N, each once: whose rows are made.
        head_fusion: As `atedm.ranking.rank_by_attention`.
        iterations: As `atedm.ranking.gwpr`.

    Returns:
        The `Scores`. Where none of the rows is kept, all copy the first kept token.
    """
    batch, heads = q.shape[:2]
    sampled = scale * q[:, :, rows]
    mean_rows = empty_map(sampled, k)
    per_map = []
    with without_autocast(q.device):
        for q_heads, k_heads in _few_heads(sampled, k):
            a = torch.softmax(in_range(q_heads @ k_heads.mT), dim=-1, dtype=torch.float32)
            mean_rows.add_(a.sum(1), alpha=1 / heads)
            if head_fusion == "rms":
                per_map.append(_passed_by_rows(a, rows, iterations))
            del a  # or it lives on while the next heads are computed
        if head_fusion != "rms":
            per_map.append(_passed_by_rows(mean_rows.unsqueeze(1), rows, iterations))
    importance = root_mean_square(torch.cat(per_map, 1).transpose(0, 1))

    def source(keep: Tensor) -> Tensor:
        place = torch.full((batch, k.shape[2]), -1, device=keep.device)
        place = place.scatter(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
        place_of_row = place[:, rows]
        candidates = mean_rows.masked_fill((place_of_row < 0).unsqueeze(-1), -1.0)
        found = place_of_row.gather(1, candidates.argmax(1))
        return point_to_themselves(found.clamp_min(0), keep)

    return Scores(importance, source)


def _passed_by_rows(a: Tensor, rows: Tensor, iterations: int) -> Tensor:
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


def _fused(a: Tensor, head_fusion: str) -> Tensor:
    """Maps that are ranked, (B, H or 1, m, N)."""
    return a if head_fusion == "rms" else a.mean(1, keepdim=True)


def _over_heads(s: Tensor, batch: int) -> Tensor:
    """Importance (B, N) from that of each map, (B H, N)."""
    return root_mean_square(torch.unflatten(s, 0, (batch, -1)).transpose(0, 1))
