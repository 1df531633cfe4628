"""The comparison sheet: dense, pruned, their difference, and where tokens were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from atedm.pictures.canvas import Cell, draw_sheet
from atedm.pictures.maps import mean_kept_overlay
from atedm.recording import Recording


@dataclass(frozen=True)
class Pair:
    """One prompt made twice from the same seed."""

    prompt: str
    dense: Image.Image
    pruned: Image.Image
    recording: Recording


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio between two 8-bit images, in dB; infinite if they are equal."""
    error = float(np.mean((_pixels(image) - _pixels(reference)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    """Draw the absolute difference of two images, twice amplified, on white: no difference is blank."""
    gap = np.abs(_pixels(image) - _pixels(reference)) * 2
    return Image.fromarray((255 - gap.clip(0, 255)).astype(np.uint8))


def comparison_sheet(pairs: Sequence[Pair], headline: str = "") -> Image.Image:
    """Draw one row a prompt: dense | pruned | difference | kept tokens."""
    rows = [
        [
            Cell(pair.dense, "dense"),
            Cell(pair.pruned, f"pruned, {pair.recording.kept_share:.0%} of tokens on the mean"),
            Cell(difference(pair.pruned, pair.dense), f"difference x 2, {psnr(pair.pruned, pair.dense):.1f} dB"),
            Cell(mean_kept_overlay(pair.pruned, pair.recording), "kept: bright often, dark seldom"),
        ]
        for pair in pairs
    ]
    largest = max(max(pair.dense.size) for pair in pairs)
    return draw_sheet(rows, [pair.prompt for pair in pairs], headline=headline, side=256 if largest <= 256 else 512)


def _pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(image.convert("RGB"), dtype=np.float32)
