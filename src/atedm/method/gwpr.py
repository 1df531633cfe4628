"""Generalized Weighted Page Rank (G-WPR): how important is each token, by the attention map alone.

An attention map A (M queries x N keys, rows sum to 1) is a weighted graph. A key is important if important queries
attend to it, and the mapping f says how the importance of keys goes back to queries. Symbols as in the paper: ``s_q``
and ``s_k`` are the importance of queries and keys, ``attention_map`` is A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from atedm.method.attention_map import empty_map, maps_in_turn, without_autocast

#: f(A, s_K): takes A (..., M, N) and s_K (..., N), returns s_Q (..., M), of any positive sum.
Mapping: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: The paper gives no count. Three is a choice, not a measured optimum.
ITERATIONS = 3

_TINY = 1e-20  # far below any importance that matters, far above where 1 / x overflows float32


def self_attention(attention_map: Tensor, s_k: Tensor) -> Tensor:
    """``s_q(i) = s_k(i)``: in self-attention a query and a key are the same token. The paper's default f.

    Rows of A sum to 1, so G-WPR with it is the power iteration for the stationary distribution of A.

    Args:
        attention_map: A, (..., N, N).
        s_k: Importance of the keys, (..., N).

    Returns:
        ``s_k`` itself, (..., N).

    Raises:
        ValueError: If A is not square, as in cross-attention.
    """
    if attention_map.shape[-2] != attention_map.shape[-1]:
        raise ValueError(
            f"self-attention needs as many queries as keys, but the map is {attention_map.shape[-2]} x "
            f"{attention_map.shape[-1]}; for cross-attention give one of the mappings of atedm.lab.ablation.mappings"
        )
    return s_k


def gwpr(attention_map: Tensor, f: Mapping = self_attention, *, iterations: int = ITERATIONS) -> Tensor:
    """Generalized Weighted Page Rank, the paper's Algorithm 1.

    Start from equal importance. Pass it from queries to keys along the attention, from keys back to queries by f,
    normalise; repeat.

    Args:
        attention_map: A, (..., M, N), rows sum to 1, any floating dtype.
        f: Importance of keys to importance of queries.
        iterations: How often. A fixed count never waits for the device, as a tolerance would.

    Returns:
        ``s_q``, (..., M) float32, sums to 1. Differentiable.

    Raises:
        ValueError: If ``iterations`` is below 1, or by ``f``.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    with without_autocast(attention_map.device):
        a = attention_map.float()
        s_q = a.new_full(a.shape[:-1], 1 / a.shape[-2])
        for _ in range(iterations):
            s_k = (s_q.unsqueeze(-2) @ a).squeeze(-2)  # A^T s_q as a row times A: reads A in the order it lies
            s_q = normalise(f(a, s_k))
    return s_q


def normalise(s: Tensor) -> Tensor:
    """``s / sum(s)`` over the last axis; all zeros become equal shares, since a hard clip may let nothing through."""
    s = s + _TINY
    return s / s.sum(-1, keepdim=True)


def root_mean_square(s: Tensor) -> Tensor:
    """``sqrt(mean(s^2))`` over the first axis; as a norm, because the root alone has no gradient at 0."""
    norm: Tensor = torch.linalg.vector_norm(s, dim=0)
    return norm / math.sqrt(s.shape[0])


class RankedMap(NamedTuple):
    """What one pass over the heads gives: see `rank_by_attention`."""

    #: (B, M) float32.
    importance: Tensor
    #: The head mean, (B, M, N) float32.
    attention_map: Tensor


def rank_by_attention(
    q: Tensor, k: Tensor, scale: float, *, f: Mapping = self_attention, iterations: int = ITERATIONS
) -> RankedMap:
    """Importance of the queries by G-WPR, together with the head-mean map that similarity-based copy needs.

    Each head is ranked on its own, and the root mean square is taken over heads (as in Zero-TPrune, which AT-EDM
    builds on), so that a token that one head cares much about is kept.

    Args:
        q: Queries, (B, H, M, D), any floating dtype.
        k: Keys, (B, H, N, D). In self-attention M = N.
        scale: The factor on the logits, usually ``D ** -0.5``.
        f: As `gwpr`.
        iterations: As `gwpr`.

    Returns:
        Importance (B, M) float32 and head-mean map (B, M, N) float32. Never more than one head's map is held.

    Raises:
        ValueError: By `atedm.method.attention_map.attention_maps` for shapes, or by `gwpr`.
    """
    mean_map = empty_map(q, k)
    per_head = []
    for a in maps_in_turn(q, k, scale):
        mean_map.add_(a, alpha=1 / q.shape[1])
        per_head.append(gwpr(a, f, iterations=iterations))
        del a  # or it lives on while the next head is computed
    return RankedMap(root_mean_square(torch.stack(per_head)), mean_map)
