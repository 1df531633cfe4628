"""The comparison sheet: the dense image, pruned ones, their difference, and where tokens were kept."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atedm.app.pictures.canvas import Cell, draw_sheet
from atedm.app.pictures.maps import mean_kept_overlay
from atedm.record import Recording


class PrunedImage(NamedTuple):
    """An image made with tokens pruned."""

    #: What to call it.
    name: str
    image: Image.Image
    #: None where no token was dropped.
    recording: Recording | None


class Comparison(NamedTuple):
    """One prompt, made several times from the same seed."""

    prompt: str
    dense: Image.Image
    pruned: tuple[PrunedImage, ...]


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Return the peak signal-to-noise ratio between two 8-bit images, in dB; infinite if they are equal."""
    error = float(np.mean((_pixels(image) - _pixels(reference)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    """Draw twice the absolute difference of two images, on white: equal images give a blank."""
    gap = np.abs(_pixels(image) - _pixels(reference)) * 2
    return Image.fromarray((255 - gap.clip(0, 255)).astype(np.uint8))


def comparison_sheet(comparisons: Sequence[Comparison], headline: str = "") -> Image.Image:
    """Draw one row a prompt: dense, then for each method its image, the difference, and the kept tokens."""
    rows = [
        [Cell(row.dense, "dense\n"), *(cell for pruned in row.pruned for cell in _cells(pruned, row.dense))]
        for row in comparisons
    ]
    largest = max(max(row.dense.size) for row in comparisons)
    return draw_sheet(rows, [row.prompt for row in comparisons], headline=headline, side=256 if largest <= 256 else 512)


def _cells(pruned: PrunedImage, dense: Image.Image) -> tuple[Cell, ...]:
    gap = Cell(difference(pruned.image, dense), f"difference x 2\n{psnr(pruned.image, dense):.1f} dB")
    if pruned.recording is None:
        return Cell(pruned.image, f"{pruned.name}\nall tokens kept"), gap
    return (
        Cell(pruned.image, f"{pruned.name}\n{pruned.recording.kept_share:.0%} of tokens kept on average"),
        gap,
        Cell(mean_kept_overlay(pruned.image, pruned.recording), "tokens kept\nbright often, dark seldom"),
    )


def _pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("RGB"), dtype=np.float64)
