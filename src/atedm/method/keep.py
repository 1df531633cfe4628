"""Choosing the tokens to keep and taking them out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Whether a graph is made by `torch.export`; torch 2.6 does not tell that from other compilation."""


def keep_count(tokens: int, pruning_rate: float) -> int:
    """How many of ``tokens`` stay at a pruning rate: ``tokens - floor(pruning_rate * tokens)``.

    Args:
        tokens: N, at least 1.
        pruning_rate: Share of the tokens to drop, in [0, 1). The paper's 0.63 keeps 37 % (supplement A.3).

    Returns:
        K, from 1 to ``tokens``.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    if not 0 <= pruning_rate < 1:
        raise ValueError(f"pruning_rate must be in [0, 1), not {pruning_rate}")
    # 0.29 * 100 is 28.999999999999996 in floating point, and 29 tokens are meant to go.
    return max(1, tokens - math.floor(pruning_rate * tokens + 1e-9))


def keep_most_important(importance: Tensor, count: int, *, one_set: bool = False) -> Tensor:
    """Indices of the ``count`` most important tokens; of equally important ones, those that come first.

    A stable sort, not ``topk``: ``topk`` leaves open which of equal values it takes, and takes others on another
    device or at another size. Ties are common (flat background, a hard clip), and the same image must come out twice.

    Args:
        importance: (B, N), any floating dtype.
        count: K, from 1 to N.
        one_set: Keep the same tokens in every row, the most important by the mean of all rows.

    Returns:
        (B, K) int64, each row ascending, so that kept tokens stay in raster order.

    Raises:
        ValueError: If ``count`` is out of its range.
    """
    if not 1 <= count <= importance.shape[-1]:
        raise ValueError(f"count must be from 1 to {importance.shape[-1]}, not {count}")
    batch = importance.shape[0]
    if one_set and batch > 1:
        importance = importance.float().mean(0, keepdim=True)
    if is_exporting():
        return true_places(_is_among_largest(importance, count), count).expand(batch, -1)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort(dim=-1).values.expand(batch, -1)


def _is_among_largest(importance: Tensor, count: int) -> Tensor:
    """Which (B, N) are the ``count`` largest, as `keep_most_important` says, by operations that runtimes have.

    ONNX and TensorRT have ``topk``, but no stable sort. Which of equal values ``topk`` takes has no say here. What is
    not a number counts as infinity.
    """
    importance = importance.masked_fill(importance.isnan(), torch.inf)
    last = importance.topk(count, dim=-1).values[:, -1:]
    larger, equal = importance > last, importance == last
    room = count - larger.sum(-1, keepdim=True)
    return larger | (equal & (equal.cumsum(-1) <= room))


def true_places(chosen: Tensor, count: int) -> Tensor:
    """Places (B, K) int64, ascending, of the ``count`` entries of each row of ``chosen`` (B, N) that are true."""
    number = chosen.shape[-1]
    place = torch.where(chosen, torch.arange(number, device=chosen.device), number)
    return place.topk(count, dim=-1, largest=False, sorted=True).values


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """``out[b, i] = tokens[b, index[b, i]]``.

    Args:
        tokens: (B, N, C).
        index: (B, K) int64 into N.

    Returns:
        (B, K, C). Differentiable in ``tokens``.
    """
    # Indexing copies whole rows; gather goes entry by entry, several times slower on a CPU.
    batch_index = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(-1)
    return tokens[batch_index, index]


def put_first(importance: Tensor, first: Tensor) -> Tensor:
    """Raise the importance of some tokens above that of all others.

    Args:
        importance: (B, N), any floating dtype. Infinities are held at the ends of what is left, and what is not a
            number counts least, so that neither comes before the tokens that are to be first.
        first: (B, N) bool.

    Returns:
        (B, N) float32: the importance of the others as it was, but for that; among the first the order is kept.
    """
    importance = importance.float()
    finite = importance.isfinite()
    lowest = importance.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
    highest = importance.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)
    lowest, highest = (end.where(end.isfinite(), 0.0) for end in (lowest, highest))
    above = highest - lowest + highest.abs() + lowest.abs() + 1  # more than rounding takes
    # Infinities one step outside of the finite ones.
    held = torch.where(importance.isnan(), -torch.inf, importance).clamp(lowest - above, highest + above)
    return torch.where(first, held + 4 * above, held)
