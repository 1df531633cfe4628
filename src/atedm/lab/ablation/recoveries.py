"""The paper's baselines of similarity-based copy (supplement A.6)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atedm.method.recovery import direct_copy


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
