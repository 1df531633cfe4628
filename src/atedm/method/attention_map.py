"""Attention maps, one head at a time.

A map of N queries and N keys has N^2 entries a head: at 4096 tokens that is 64 MiB in float32, times heads and batch.
Everything the method wants from the maps is a sum over heads, so no more than one head is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_BLOCK_BYTES = 8 * 2**20
"""Of the rows of a map that are made at once: a few MiB stay in the caches of a core or two."""


def attention_maps(q: Tensor, k: Tensor, scale: float) -> Iterator[Tensor]:
    """Yield ``A = softmax(scale * q k^T)`` of one head after another.

    The maps are made while they are asked for. A caller that drops one before it asks for the next holds one map only.

    Args:
        q: Queries, (B, H, M, D), any floating dtype.
        k: Keys, (B, H, N, D), of the same dtype.
        scale: The factor on the logits, usually ``D ** -0.5``.

    Returns:
        An iterator over the H heads, each a (B, M, N) float32 map whose rows sum to 1. The product is taken in the
        dtype of ``q``, the softmax in float32.

    Raises:
        ValueError: If ``q`` and ``k`` are not four-dimensional or differ in batch, heads or head width.
    """
    _check(q, k)
    # Scaling q, not the logits, saves an M x N temporary and keeps float16 products in range.
    return (
        torch.softmax(in_range((scale * q_head) @ k_head.mT), dim=-1, dtype=torch.float32)
        for q_head, k_head in zip(q.unbind(1), k.unbind(1), strict=True)
    )


def maps_in_turn(q: Tensor, k: Tensor, scale: float) -> Iterator[Tensor]:
    """As `attention_maps`, but in the same memory: each map is gone when the next is asked for.

    A fresh map of a large image is memory that the system has to clear, which takes longer than to compute it. Where a
    gradient may be asked for, or a compiler plans the memory, it is as `attention_maps`.

    Raises:
        ValueError: As `attention_maps`.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        yield from attention_maps(q, k, scale)
        return
    _check(q, k)
    a = empty_map(q, k)
    step = rows_at_once(a.shape[0] * a.shape[2])
    for q_head, k_head in zip(q.unbind(1), k.unbind(1), strict=True):
        keys = k_head.mT
        for start in range(0, a.shape[1], step):
            rows = slice(start, start + step)
            a[:, rows] = torch.softmax(in_range((scale * q_head[:, rows]) @ keys), dim=-1, dtype=torch.float32)
        yield a


def in_range(logits: Tensor) -> Tensor:
    """Hold products that left the range of float16 at its end, where a softmax would make NaNs of infinities.

    Fused attention sums in float32, so a model may work in float16 although its logits do not fit.
    """
    if logits.dtype != torch.float16:
        return logits
    largest = torch.finfo(torch.float16).max
    return logits.clamp(-largest, largest)


def rows_at_once(entries: int) -> int:
    """How many rows of so many float32 entries are made at once, at least one."""
    return max(1, _BLOCK_BYTES // max(1, 4 * entries))


def _check(q: Tensor, k: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be (B, H, M, D) and k (B, H, N, D), but they are {tuple(q.shape)} and {tuple(k.shape)}"
        )


def mean_attention_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The attention map averaged over the heads.

    Args:
        q: Queries, (B, H, M, D).
        k: Keys, (B, H, N, D).
        scale: The factor on the logits, usually ``D ** -0.5``.

    Returns:
        (B, M, N) float32, rows sum to 1.

    Raises:
        ValueError: As `attention_maps`.
    """
    mean = empty_map(q, k)
    for a in maps_in_turn(q, k, scale):
        mean.add_(a, alpha=1 / q.shape[1])
        del a  # or it lives on while the next head is computed
    return mean


def empty_map(q: Tensor, k: Tensor) -> Tensor:
    """A zero (B, M, N) float32 map to add the heads of ``q`` (B, H, M, D) and ``k`` (B, H, N, D) to."""
    return q.new_zeros(q.shape[0], q.shape[-2], k.shape[-2], dtype=torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which float32 products on ``device`` stay float32, even where the caller runs under autocast.

    Importances are about 1/N each and cosines of neighbours about 1: 16 bits do not tell them apart.
    """
    if not torch.amp.is_autocast_available(device.type):  # such as "meta", where torch.autocast itself would raise
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
