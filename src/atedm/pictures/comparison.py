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
class Pruned:
    """An image made with tokens pruned."""

    #: What to call it.
    name: str
    image: Image.Image
    recording: Recording


@dataclass(frozen=True)
class Comparison:
    """One prompt made several times from the same seed."""

    prompt: str
    dense: Image.Image
    pruned: tuple[Pruned, ...]


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio between two 8-bit images, in dB; infinite if they are equal."""
    error = float(np.mean((_pixels(image) - _pixels(reference)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    """Draw the absolute difference of two images, twice amplified, on white: no difference is blank."""
    gap = np.abs(_pixels(image) - _pixels(reference)) * 2
    return Image.fromarray((255 - gap.clip(0, 255)).astype(np.uint8))


def comparison_sheet(comparisons: Sequence[Comparison], headline: str = "") -> Image.Image:
    """Draw one row a prompt: dense, then for each way of pruning its image, the difference, and the kept tokens."""
    rows = [
        [Cell(one.dense, "dense\n"), *(cell for way in one.pruned for cell in _cells(way, one))] for one in comparisons
    ]
    largest = max(max(one.dense.size) for one in comparisons)
    return draw_sheet(rows, [one.prompt for one in comparisons], headline=headline, side=256 if largest <= 256 else 512)


def _cells(way: Pruned, of: Comparison) -> tuple[Cell, Cell, Cell]:
    apart = psnr(way.image, of.dense)
    return (
        Cell(way.image, f"{way.name}\n{way.recording.kept_share:.0%} of tokens on the mean"),
        Cell(difference(way.image, of.dense), f"difference x 2\n{apart:.1f} dB"),
        Cell(mean_kept_overlay(way.image, way.recording), "tokens kept\nbright often, dark seldom"),
    )


def _pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(image.convert("RGB"), dtype=np.float32)
