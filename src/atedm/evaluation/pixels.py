"""Reading a picture's pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


def read_pixels(file: Path, side: int | None = None) -> torch.Tensor:
    """Return the (3, H, W) uint8 pixels of a picture.

    Args:
        file: Of the picture.
        side: Scale it to a square of so many pixels; None leaves it as it is.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
            if side is not None and picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error
