"""Regions that are never pruned: a mask over the image becomes tokens of a grid that rank above all others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from atedm.method.keep import put_first


def region(mask: Any) -> Tensor:
    """Read a mask over the image.

    Args:
        mask: A tensor or array (H, W) or with axes of length one before it, or a PIL image, which is read in grey. Of
            any size: it is laid over the whole image. What is above half of the largest possible value is protected:
            True, or above 0.5 of 1; in a picture, and in integers that exceed 1, above 127 of 255 in 8 bits, and above
            32767 of 65535 in 16.

    Returns:
        (H, W) float32 of zeros and ones.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it has no two sides, or numbers of which the largest possible one is not known.
    """
    half: float
    if hasattr(mask, "convert"):
        deep = mask.mode.startswith("I")  # 16 bits, which a conversion to 8 would cut off
        values = torch.from_numpy(np.array(mask if deep else mask.convert("L"), np.float32))
        half = 32767 if deep else 127
    elif isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        # In the machine's own byte order and in memory of its own, as torch asks for.
        values = torch.from_numpy(np.array(mask, np.float32, order="C"))
        half = _half(values, mask.dtype.name)
    elif isinstance(mask, Tensor):
        values = mask.float()
        half = _half(values, str(mask.dtype).removeprefix("torch."))
    else:
        raise TypeError(f"a mask must be a tensor, an array of numbers or an image, not a {type(mask).__name__}")
    flat = values.reshape(values.shape[-2:]) if values.ndim > 2 and values.shape[:-2].numel() == 1 else values
    if flat.ndim != 2 or not flat.numel():
        raise ValueError(f"a mask must be (H, W), one for all images, not {tuple(flat.shape)}")
    return (flat > half).float()


def _half(values: Tensor, dtype: str) -> float:
    """Half of the largest possible value of a mask of numbers."""
    highest = float(values.max()) if values.numel() else 0.0
    if not highest > 1 or (highest < 2 and "float" in dtype):  # a mask that was resized may exceed 1 a little
        return 0.5
    if dtype in ("uint8", "uint16"):
        return 127 if dtype == "uint8" else 32767
    raise ValueError(
        f"a mask of {dtype} that goes up to {highest:g} may mean anything; give zeros and ones, or uint8 from 0 to 255"
    )


def protected_tokens(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which tokens of a grid of ``size`` (h, w) have some of a `region` (H, W) within, (h w,) zeros and ones."""
    return functional.adaptive_max_pool2d(mask.unsqueeze(0), size).flatten()


def with_protected(importance: Tensor, protected: Tensor | None) -> Tensor:
    """Let protected tokens rank above all others, and leave the others as they are.

    Args:
        importance: (B, N).
        protected: (N,) zeros and ones; None leaves everything as it is.

    Returns:
        (B, N), see `atedm.method.keep.put_first`.
    """
    return importance if protected is None else put_first(importance, protected.bool().expand_as(importance))
