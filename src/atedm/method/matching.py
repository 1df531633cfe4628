"""Whom a dropped token is refilled from: the kept token that is most like it, by one of several rules.

A source is a position within ``keep``. Kept tokens point to themselves; of equal candidates the first is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atedm.method.attention_map import without_autocast
from atedm.method.keep import gather_tokens, is_exporting, true_places

_CHUNK = 2**22
"""Entries of a product of tokens that are held at once: 16 MiB in float32."""
_CHUNK_ON_GPU = 2**26
"""Likewise on a GPU: 256 MiB. A guided step of SDXL at 1024 px stays below, so that it takes one product."""
_HAS_MIXED_PRODUCT = hasattr(torch.ops.aten.bmm, "dtype")
"""Whether this torch can multiply 16-bit tensors into a float32 one, on CUDA."""


def attention_source(attention_map: Tensor, keep: Tensor) -> Tensor:
    """Whom each token copies from: ``source(b) = argmax over kept i of A[i, b]``.

    Keep the rows of kept tokens and look down the column of a pruned token b: it copies from the kept query that
    attends most to it. The paper's example has seven tokens of which 3, 5 and 7 are kept, and the arrows 7 -> 1,
    3 -> 2, 3 -> 4 and 7 -> 6:

        >>> import torch
        >>> A = torch.full((1, 7, 7), 1 / 7)
        >>> A[0, 3 - 1] = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.10, 0.05, 0.05])
        >>> A[0, 5 - 1] = torch.tensor([0.15, 0.10, 0.15, 0.10, 0.25, 0.10, 0.15])
        >>> A[0, 7 - 1] = torch.tensor([0.30, 0.05, 0.10, 0.05, 0.10, 0.25, 0.15])
        >>> keep = torch.tensor([[3, 5, 7]]) - 1
        >>> source = attention_source(A, keep)  # positions within keep
        >>> source
        tensor([[2, 0, 0, 0, 1, 2, 2]])
        >>> keep.gather(1, source) + 1  # the tokens themselves, counted from 1
        tensor([[7, 3, 3, 3, 5, 7, 7]])

    Args:
        attention_map: A, (B, N, N), queries first, any floating dtype.
        keep: (B, K) int64.

    Returns:
        (B, N) int64: for each token, the position within ``keep`` of the token to copy. Kept tokens point to
        themselves; of equal entries the first is taken.
    """
    return point_to_themselves(gather_tokens(attention_map, keep).argmax(dim=1), keep)


class Match(NamedTuple):
    """The kept token most like each token, and how like it is."""

    #: (B, N) int64 positions within ``keep``; kept tokens point to themselves.
    source: Tensor
    #: (B, N): minus the squared distance of features; not defined for kept tokens.
    similarity: Tensor


def match_by_features(tokens: Tensor, keep: Tensor) -> Match:
    """Find the kept token whose features are nearest to each token's own, by Euclidean distance.

    Needs no attention map. The product of dropped and kept tokens is made in pieces of 16 MiB (on a GPU 256) and not
    kept. To match by cosine, give normalised tokens.

    Args:
        tokens: Features of all tokens, (B, N, C), any floating dtype; compared in float32 or better, but in bfloat16
            on the CPU, where of tokens within a hundredth of the nearest any may be found.
        keep: (B, K) int64.

    Returns:
        The `Match`; of equally similar tokens the first is taken.
    """
    if tokens.is_cuda and not is_exporting():
        return _match_every_token(tokens, keep)
    dropped = dropped_tokens(keep, tokens.shape[1])
    in_16_bits = tokens.dtype == torch.bfloat16 and tokens.device.type == "cpu"
    features = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    kept = gather_tokens(features, keep)
    half_squares = None if in_16_bits else 0.5 * kept.square().sum(-1).unsqueeze(1)
    other_side = _distance_columns(gather_tokens(tokens, keep), of_kept=True).mT if in_16_bits else kept.mT
    rows = max(1, _CHUNK // (keep.shape[0] * keep.shape[1]))
    best, similarity = [dropped[:, :0]], [features[:, :0, 0]]
    for part in torch.split(dropped, rows, dim=1):
        of_part = gather_tokens(features, part)
        side = _distance_columns(gather_tokens(tokens, part), of_kept=False) if in_16_bits else of_part
        with without_autocast(tokens.device):
            alike = side @ other_side
        if half_squares is not None:
            alike = alike - half_squares  # what a . b - |b|^2 / 2 is largest for is nearest to a
        value, index = alike.max(dim=-1)
        best.append(index)
        if in_16_bits:
            similarity.append(-(of_part - gather_tokens(kept, index)).square().sum(-1))
        else:
            similarity.append(2 * value - of_part.square().sum(-1))
    nothing = keep.new_zeros(tokens.shape[:2])
    source = nothing.scatter(1, dropped, torch.cat(best, dim=1))
    likeness = features.new_zeros(tokens.shape[:2]).scatter(1, dropped, torch.cat(similarity, dim=1))
    return Match(point_to_themselves(source, keep), likeness)


def _match_every_token(tokens: Tensor, keep: Tensor) -> Match:
    """Match kept tokens too, and let them point to themselves at the end.

    A GPU multiplies more than it needs sooner than it starts the operations that pick out the dropped tokens.
    """
    squares = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.promote_types(tokens.dtype, torch.float32)).square()
    kept, half_squares = gather_tokens(tokens, keep), 0.5 * squares.gather(1, keep).unsqueeze(1)
    best, index = [], []
    for part in torch.split(tokens, max(1, _CHUNK_ON_GPU // keep.numel()), dim=1):
        with without_autocast(tokens.device):
            alike = _product(part, kept.mT).sub_(half_squares)  # largest where |a - b| is least
        largest = alike.max(dim=-1)
        best.append(largest.values)
        index.append(largest.indices)
    similarity = 2 * torch.cat(best, dim=1) - squares
    return Match(point_to_themselves(torch.cat(index, dim=1), keep), similarity)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (B, M, C) and (B, C, K) into float32, or float64 for float64.

    On CUDA 16-bit numbers go into the units for them. Nothing is lost: the product of two of them fits float32, where
    it is summed.
    """
    if a.is_cuda and a.itemsize == 2 and _HAS_MIXED_PRODUCT:
        return torch.bmm(a.detach(), b.detach(), out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _distance_columns(x: Tensor, *, of_kept: bool) -> Tensor:
    """Columns for tokens (B, M, C) in bfloat16, whose product is minus the squared distance of tokens to kept ones.

    Products are summed in float32 and only then rounded to the 8 bits of a bfloat16. Of ``a . b`` that would leave
    nothing to tell neighbours apart; of ``2 a . b - |a|^2 - |b|^2``, with the squares in columns of their own, it is
    8 bits of the distance itself. Such a product takes a fifth of the time of one in float32 where the processor has
    units for it. On CUDA sums may be rounded in between, and float32 is fast.
    """
    left = x.float().square().sum(-1)
    parts = []
    for _ in range(3):  # which hold 24 bits between them
        parts.append(left.to(x.dtype))
        left = left - parts[-1].float()
    squares = -torch.stack(parts, -1)
    ones = torch.ones_like(squares)
    return torch.cat([2 * x, ones, squares] if of_kept else [x, squares, ones], dim=-1)


def dropped_tokens(keep: Tensor, tokens: int) -> Tensor:
    """Indices of the tokens that are not kept.

    Args:
        keep: (B, K) int64, each row without repetition.
        tokens: N.

    Returns:
        (B, N - K) int64, each row ascending.
    """
    is_kept = torch.zeros(keep.shape[0], tokens, dtype=torch.int8, device=keep.device).scatter(1, keep, 1)
    if is_exporting():
        return true_places(is_kept == 0, tokens - keep.shape[1])
    return is_kept.argsort(dim=-1, stable=True)[:, : tokens - keep.shape[1]]


def point_to_themselves(source: Tensor, keep: Tensor) -> Tensor:
    """Let kept tokens of a ``source`` (B, N) point to their own position within ``keep`` (B, K)."""
    return source.scatter(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
