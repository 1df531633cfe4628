"""Filling the dropped positions again, because a convolution needs the whole feature map.

Similarity-based copy is the paper's way; zero padding, bicubic interpolation and direct copy are its baselines
(supplement A.6). ``keep`` (B, K) always holds the indices of the kept tokens, ``kept_tokens`` (B, K, C) their values
after the last layer of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atedm.attention_map import without_autocast
from atedm.pruning import gather_tokens

# --- Similarity-based copy --------------------------------------------------------------------------------------------


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
    return _most_similar_kept(gather_tokens(attention_map, keep), keep)


def cosine_source(tokens: Tensor, keep: Tensor) -> Tensor:
    """Whom each token copies from, by features instead of attention: the kept token of the largest cosine.

    A control for `attention_source`; needs no attention map.

    Args:
        tokens: Features of all tokens, (B, N, C), any floating dtype.
        keep: (B, K) int64.

    Returns:
        (B, N) int64: for each token, the position within ``keep`` of the token to copy. Kept tokens point to
        themselves; of equal cosines the first is taken.
    """
    with without_autocast(tokens.device):
        unit = functional.normalize(tokens.float(), dim=-1)
        return _most_similar_kept(gather_tokens(unit, keep) @ unit.mT, keep)


def _most_similar_kept(similarity: Tensor, keep: Tensor) -> Tensor:
    """Argmax over K of ``similarity`` (B, K, N), with kept tokens pointing to themselves."""
    position = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return similarity.argmax(dim=1).scatter(1, keep, position)


def similarity_copy(kept_tokens: Tensor, source: Tensor) -> Tensor:
    """Similarity-based copy: ``out[b] = kept_tokens[source(b)]``, the paper's recovery.

    Args:
        kept_tokens: (B, K, C).
        source: (B, N) int64 positions within K, by `attention_source` or `cosine_source`.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens``: a token that is copied often gets that many gradients.
    """
    return gather_tokens(kept_tokens, source)


# --- Baselines (supplement A.6) ---------------------------------------------------------------------------------------


def direct_copy(kept_tokens: Tensor, keep: Tensor, before: Tensor) -> Tensor:
    """Dropped tokens take the value they had when they were dropped (supplement A.6 III).

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        before: All tokens as they were before pruning, (B, N, C), dtype of ``kept_tokens``.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens`` and ``before``.
    """
    return before.scatter(1, keep.unsqueeze(-1).expand_as(kept_tokens), kept_tokens)


def zero_padding(kept_tokens: Tensor, keep: Tensor, tokens: int) -> Tensor:
    """Dropped tokens become zero (supplement A.6 I).

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        tokens: N.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens``.
    """
    batch, _, channels = kept_tokens.shape
    return direct_copy(kept_tokens, keep, kept_tokens.new_zeros(batch, tokens, channels))


def bicubic_interpolation(kept_tokens: Tensor, keep: Tensor, size: tuple[int, int]) -> Tensor:
    """Dropped tokens are interpolated from a half-size image with zeros in their places (supplement A.6 II).

    Zeros in, h x w to h/2 x w/2 and back by bicubic interpolation without antialiasing; half an odd side is rounded
    down, to 1 at least. Only dropped positions take the result.

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        size: (h, w) with N = h w, tokens in raster order.

    Returns:
        (B, N, C) in the dtype of ``kept_tokens``, interpolated in float32 or better. Differentiable in
        ``kept_tokens``.
    """
    h, w = size
    dtype = torch.promote_types(kept_tokens.dtype, torch.float32)
    padded = zero_padding(kept_tokens.to(dtype), keep, h * w)
    image = padded.mT.reshape(*padded.mT.shape[:2], h, w)
    half = functional.interpolate(image, (max(h // 2, 1), max(w // 2, 1)), mode="bicubic", align_corners=False)
    whole = functional.interpolate(half, (h, w), mode="bicubic", align_corners=False)
    return direct_copy(kept_tokens, keep, whole.flatten(2).mT.to(kept_tokens.dtype))
