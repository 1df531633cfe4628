"""Pixels of pictures, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_picture(file: Path) -> Image.Image:
    """Open a picture in RGB.

    Raises:
        ValueError: If it cannot be read; the message names it.
    """
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error


def read_pixels(file: Path, side: int | None = None) -> Tensor:
    """Return the (3, H, W) uint8 pixels of a picture, scaled to a square of ``side`` pixels if one is given.

    Raises:
        ValueError: If it cannot be read.
    """
    picture = read_picture(file)
    if side is not None and picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def distances(files: Sequence[Path], references: Sequence[Path]) -> list[float]:
    """Return the PSNR in dB of each picture to its reference, 99 where they are equal.

    Raises:
        ValueError: If one cannot be read, or two differ in size.
    """
    found = []
    for file, reference in zip(files, references, strict=True):
        ours, theirs = read_pixels(file), read_pixels(reference)
        if ours.shape != theirs.shape:
            sizes = [f"{pixels.shape[2]} x {pixels.shape[1]}" for pixels in (ours, theirs)]
            raise ValueError(f"{file} has {sizes[0]} pixels, {reference} has {sizes[1]}; remove the one that is wrong")
        error = (ours.double() - theirs).square().mean().clamp_min(255**2 * 10**-9.9)
        found.append(float(10 * torch.log10(255**2 / error)))
    return found
