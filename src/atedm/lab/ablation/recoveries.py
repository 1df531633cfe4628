"""The paper's baselines of similarity-based copy (supplement A.6).

Each takes the kept tokens, (B, K, C), and their places ``keep``, (B, K) int64, and returns all tokens, (B, N, C).
Both are differentiable in the kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atedm.method.recovery import direct_copy


def zero_padding(kept_tokens: Tensor, keep: Tensor, tokens: int) -> Tensor:
    """Dropped ones of the N ``tokens`` become zero (supplement A.6 I)."""
    batch, _, channels = kept_tokens.shape
    return direct_copy(kept_tokens, keep, kept_tokens.new_zeros(batch, tokens, channels))


def bicubic_interpolation(kept_tokens: Tensor, keep: Tensor, size: tuple[int, int]) -> Tensor:
    """Dropped tokens are interpolated from a half-size image with zeros in their places (supplement A.6 II).

    Zeros in, h x w to h/2 x w/2 and back by bicubic interpolation without antialiasing; half an odd side is rounded
    down, to 1 at least. Only dropped positions take the result. ``size`` is (h, w), N = h w in raster order. The
    result has the dtype of the kept tokens, and is interpolated in float32 or better.
    """
    h, w = size
    dtype = torch.promote_types(kept_tokens.dtype, torch.float32)
    padded = zero_padding(kept_tokens.to(dtype), keep, h * w)
    image = padded.mT.reshape(*padded.mT.shape[:2], h, w)
    half = functional.interpolate(image, (max(h // 2, 1), max(w // 2, 1)), mode="bicubic", align_corners=False)
    whole = functional.interpolate(half, (h, w), mode="bicubic", align_corners=False)
    return direct_copy(kept_tokens, keep, whole.flatten(2).mT.to(kept_tokens.dtype))
