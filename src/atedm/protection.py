"""Regions that are never pruned: a mask over the image becomes tokens of a grid that rank above all others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from atedm.pruning import put_first


def region(mask: Any) -> Tensor:
    """Read a mask over the image.

    Args:
        mask: A tensor or array (H, W) or with axes of length one before it, bool or numbers, or a PIL image, which is
            read in grey. Of any size: it is laid over the whole image. What is above half of the largest possible
            value is protected: True, above 0.5, or above 127 of 255.

    Returns:
        (H, W) float32 of zeros and ones.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it has no two sides.
    """
    if hasattr(mask, "convert"):
        mask = np.array(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask must be a tensor, an array or an image, not a {type(mask).__name__}")
    flat = mask.reshape(mask.shape[-2:]) if mask.ndim > 2 and mask.shape[:-2].numel() == 1 else mask
    if flat.ndim != 2 or not flat.numel():
        raise ValueError(f"a mask must be (H, W), one for all images, not {tuple(mask.shape)}")
    return (flat.float() > (127 if flat.dtype == torch.uint8 else 0.5)).float()


def protected_tokens(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which tokens of a grid of ``size`` (h, w) have some of a `region` (H, W) within, (h w,) zeros and ones."""
    return functional.adaptive_max_pool2d(mask.unsqueeze(0), size).flatten()


def with_protected(importance: Tensor, protected: Tensor) -> Tensor:
    """Let protected tokens (N,) rank above all others, and leave the others as they are.

    Args:
        importance: (B, N).
        protected: Of zeros and ones.

    Returns:
        (B, N) float32, see `atedm.pruning.put_first`.
    """
    return put_first(importance, protected.bool().expand_as(importance))
