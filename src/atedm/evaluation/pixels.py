"""Reading a picture's pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


def read_pixels(file: Path) -> torch.Tensor:
    """Return the (3, H, W) uint8 pixels of a picture.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(file) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error
