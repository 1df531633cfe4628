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

from atedm.attention_map import empty_map, maps_in_turn, without_autocast

#: f(A, s_K): takes A (..., M, N) and s_K (..., N), returns s_Q (..., M), of any positive sum.
Mapping: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: How the importance of several heads becomes one: see `rank_by_attention`.
HEAD_FUSIONS = ("rms", "mean-map")

#: The paper gives no count. Three is a choice, not a measured optimum.
ITERATIONS = 3

_TINY = 1e-20  # far below any importance that matters, far above where 1 / x overflows float32
_UINT32 = 0xFFFFFFFF
_MAX_EXPONENT = 60.0  # e^60 times M N of them is still a float32


# --- The mappings f(A, s_K) -------------------------------------------------------------------------------------------


def self_attention(attention_map: Tensor, s_k: Tensor) -> Tensor:
    """``s_q(i) = s_k(i)``: in self-attention a query and a key are the same token. The paper's default.

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
            f"{attention_map.shape[-1]}; for cross-attention use one of {sorted(MAPPINGS.keys() - {'self-attention'})}"
        )
    return s_k


def entropy(attention_map: Tensor, s_k: Tensor, floor: float = 1e-6) -> Tensor:
    """``s_q(i) = sum_j A_ij s_k(j) / (-sum_j A_ij ln A_ij)``: attend to what matters, and to few.

    Supplement C.2 says that it rewards by the dot product and penalises by the entropy; the quotient is our reading.

    Args:
        attention_map: A, (..., M, N).
        s_k: Importance of the keys, (..., N).
        floor: Least entropy to divide by; a one-hot row has none.

    Returns:
        (..., M).
    """
    reward = torch.einsum("...mn,...n->...m", attention_map, s_k)
    # 0 ln 0 = 0, and its gradient is finite.
    row_entropy = -torch.einsum("...mn,...mn->...m", attention_map, attention_map.clamp_min(_TINY).log())
    return reward / row_entropy.clamp_min(floor)


def hard_clip(attention_map: Tensor, s_k: Tensor, eta: float = 0.2) -> Tensor:
    """``s_q(i) = sum_j [A_ij >= eta] s_k(j)`` (supplement Eq. 2).

    Args:
        attention_map: A, (..., M, N).
        s_k: Importance of the keys, (..., N).
        eta: The threshold of attention.

    Returns:
        (..., M).
    """
    return torch.einsum("...mn,...n->...m", (attention_map >= eta).to(s_k.dtype), s_k)


def soft_clip(attention_map: Tensor, s_k: Tensor, eta: float = 0.2) -> Tensor:
    """``s_q(i) = sum_j sigmoid(A_ij - eta) s_k(j)`` (supplement Eq. 3).

    Args:
        attention_map: A, (..., M, N).
        s_k: Importance of the keys, (..., N).
        eta: The threshold of attention.

    Returns:
        (..., M).
    """
    return torch.einsum("...mn,...n->...m", torch.sigmoid(attention_map - eta), s_k)


def power(attention_map: Tensor, s_k: Tensor, alpha: float = 5.0, beta: float | None = None) -> Tensor:
    """``s_q(i) = sum_j (beta s_k(j)) ^ (alpha A_ij)`` (supplement Eq. 4).

    Computed as ``exp(alpha A_ij ln(beta s_k(j)))`` with the exponent capped at 60, so that no alpha overflows; the
    default alpha and beta stay below 60 up to 300 000 keys. ``s_k(j) = 0`` counts as the least positive number, which
    gives 1 where ``A_ij = 0`` too.

    Args:
        attention_map: A, (..., M, N).
        s_k: Importance of the keys, (..., N).
        alpha: The factor on the exponent.
        beta: The factor on the base; None is the paper's N / 2.

    Returns:
        (..., M).
    """
    beta = s_k.shape[-1] / 2 if beta is None else beta
    log_base = torch.log(beta * s_k.clamp_min(torch.finfo(s_k.dtype).tiny))
    exponent = attention_map * (alpha * log_base).unsqueeze(-2)
    return exponent.clamp_max_(_MAX_EXPONENT).exp_().sum(-1)  # in place: this M x N temporary is the only one


#: The mappings by name, the paper's default first.
MAPPINGS: dict[str, Mapping] = {
    "self-attention": self_attention,
    "entropy": entropy,
    "hard-clip": hard_clip,
    "soft-clip": soft_clip,
    "power": power,
}


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


def gwpr(
    attention_map: Tensor,
    f: Mapping = self_attention,
    *,
    iterations: int = ITERATIONS,
    tolerance: float | None = None,
) -> Tensor:
    """Generalized Weighted Page Rank, the paper's Algorithm 1.

    Start from equal importance. Pass it from queries to keys along the attention, from keys back to queries by f,
    normalise; repeat.

    Args:
        attention_map: A, (..., M, N), rows sum to 1, any floating dtype.
        f: Importance of keys to importance of queries, see `MAPPINGS`.
        iterations: How often; with a ``tolerance``, how often at most.
        tolerance: A map is done once ``sum |s_new - s_old|`` is below this, whatever others of the batch are at. This
            waits for the device in each iteration; None runs a fixed count and never waits.

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
        done = torch.zeros_like(s_q[..., :1], dtype=torch.bool)
        for _ in range(iterations):
            s_old = s_q
            s_k = (s_q.unsqueeze(-2) @ a).squeeze(-2)  # A^T s_q as a row times A: reads A in the order it lies
            s_q = normalise(f(a, s_k))
            if tolerance is not None:
                s_q = torch.where(done, s_old, s_q)
                done = done | ((s_q - s_old).abs().sum(-1, keepdim=True) < tolerance)
                if done.all():
                    break
    return s_q


def normalise(s: Tensor) -> Tensor:
    """``s / sum(s)`` over the last axis; all zeros become equal shares, since a hard clip may let nothing through."""
    s = s + _TINY
    return s / s.sum(-1, keepdim=True)


class RankedMap(NamedTuple):
    """What one pass over the heads gives: see `rank_by_attention`."""

    #: (B, M) float32.
    importance: Tensor
    #: The head mean, (B, M, N) float32.
    attention_map: Tensor


def rank_by_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    f: Mapping = self_attention,
    head_fusion: str = "rms",
    iterations: int = ITERATIONS,
    tolerance: float | None = None,
) -> RankedMap:
    """Importance of the queries by G-WPR, together with the head-mean map that similarity-based copy needs.

    Heads are fused in one of two ways: ``"rms"`` ranks each head and takes the root mean square over heads, so that
    a token one head cares much about is kept; ``"mean-map"`` ranks the head-mean map.

    Args:
        q: Queries, (B, H, M, D), any floating dtype.
        k: Keys, (B, H, N, D). In self-attention M = N.
        scale: The factor on the logits, usually ``D ** -0.5``.
        f: As `gwpr`.
        head_fusion: A name in `HEAD_FUSIONS`.
        iterations: As `gwpr`.
        tolerance: As `gwpr`.

    Returns:
        Importance (B, M) float32 and head-mean map (B, M, N) float32. Never more than one head's map is held.

    Raises:
        ValueError: If ``head_fusion`` is unknown, by `attention_maps` for shapes, or by `gwpr`.
    """
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion must be one of {list(HEAD_FUSIONS)}, not {head_fusion!r}")
    mean_map = empty_map(q, k)
    per_head = []
    for a in maps_in_turn(q, k, scale):
        mean_map.add_(a, alpha=1 / q.shape[1])
        if head_fusion == "rms":
            per_head.append(gwpr(a, f, iterations=iterations, tolerance=tolerance))
        del a  # or it lives on while the next head is computed
    if head_fusion == "rms":
        importance = root_mean_square(torch.stack(per_head))
    else:
        importance = gwpr(mean_map, f, iterations=iterations, tolerance=tolerance)
    return RankedMap(importance, mean_map)


def root_mean_square(s: Tensor) -> Tensor:
    """``sqrt(mean(s^2))`` over the first axis; as a norm, because the root alone has no gradient at 0."""
    norm: Tensor = torch.linalg.vector_norm(s, dim=0)
    return norm / math.sqrt(s.shape[0])


# --- Controls: what is gained over simpler rankings -------------------------------------------------------------------


def attention_received(attention_map: Tensor) -> Tensor:
    """``mean_i A_ij``, the attention each key gets: one iteration of self-attention G-WPR.

    Args:
        attention_map: A, (..., M, N), any floating dtype.

    Returns:
        (..., N) float32, sums to 1.
    """
    return attention_map.mean(-2, dtype=torch.float32)


def uniform_random(
    batch: int, tokens: int, *, seed: int, step: int | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Importance by chance: a hash of (seed, step, place in the batch, token) as a number in [0, 1).

    No generator is read or advanced, so the images' own noise stays as it was, the numbers are equal on every device,
    and the function can be compiled.

    Args:
        batch: B.
        tokens: N.
        seed: Any integer; its low 64 bits count.
        step: Index of the denoising step; its low 32 bits count.
        device: Where to put the result.

    Returns:
        (B, N) float32, multiples of 2^-24 in [0, 1).
    """
    batch_index = torch.arange(batch, device=device).unsqueeze(-1)
    token_index = torch.arange(tokens, device=device)
    state = torch.zeros(1, 1, dtype=torch.int64, device=device)
    word: int | Tensor
    for word in (seed & _UINT32, (seed >> 32) & _UINT32, step, batch_index, token_index):
        state = _splitmix32(state + word)
    return (state >> 8).float() / 2**24  # 24 bits are what a float32 holds exactly


def _splitmix32(x: Tensor) -> Tensor:
    """The splitmix32 step on int64 values in [0, 2^32): a bijection that mixes every bit into every other.

    Both multipliers are below 2^31, so a product stays below 2^63: no signed overflow, whose result is not defined.
    """
    x = (x + 0x9E3779B9) & _UINT32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _UINT32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _UINT32
    return x ^ (x >> 15)
