"""What was important and what was kept, drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from atedm.patching.transformer import BlockObservation
from atedm.pictures.canvas import Cell, draw_sheet
from atedm.recording import Recording

SIDE = 144
"""Side of one map on a sheet, in pixels."""


def kept_overlay(image: Image.Image, seen: BlockObservation, element: int = -1) -> Image.Image:
    """Dim the tokens that one pruning layer dropped.

    Args:
        image: The finished image.
        seen: What was observed.
        element: Which element of the batch; with guidance the last is the prompted one.
    """
    kept = np.zeros(seen.size[0] * seen.size[1], dtype=np.float32)
    kept[seen.keep[element].numpy()] = 1
    return _dim(image, kept.reshape(seen.size))


def importance_overlay(image: Image.Image, seen: BlockObservation, element: int = -1) -> Image.Image:
    """Colour the image by the rank of each token: dark blue the least important, yellow the most."""
    importance = seen.importance[element].numpy()
    rank = importance.argsort(kind="stable").argsort(kind="stable") / max(1, importance.size - 1)
    heat = colormaps["viridis"](rank.reshape(seen.size))[..., :3]
    grid = Image.fromarray((heat * 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), grid, 0.65)


def mean_kept_overlay(image: Image.Image, recording: Recording, element: int = -1) -> Image.Image:
    """Dim each place by how often its tokens were dropped, over all pruning layers and steps."""
    if not recording.observations:
        return image.convert("RGB")
    height, width = np.array([seen.size for seen in recording.observations]).max(axis=0)
    total = np.zeros((height, width), dtype=np.float32)
    for seen in recording.observations:
        kept = np.zeros(seen.size[0] * seen.size[1], dtype=np.float32)
        kept[seen.keep[element].numpy()] = 1
        grid = Image.fromarray(kept.reshape(seen.size)).resize((width, height), Image.Resampling.NEAREST)
        total += np.asarray(grid)
    share = (total / len(recording.observations)).astype(np.float32)
    low, high = float(share.min()), float(share.max())
    return _dim(image, (share - np.float32(low)) / np.float32(max(1e-6, high - low)))


def _dim(image: Image.Image, light: NDArray[np.float32]) -> Image.Image:
    """Darken and grey the places where ``light`` (h, w) in [0, 1] is low."""
    mask = Image.fromarray((light * 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    dark = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, (18, 18, 34)), 0.78)
    return Image.composite(image.convert("RGB"), dark, mask)


def maps_sheet(image: Image.Image, recording: Recording, prompt: str, columns: int = 6) -> Image.Image:
    """Draw importance and kept tokens of every block at a few steps, two rows a block.

    Args:
        image: The finished image.
        recording: What was recorded while it was made.
        prompt: Shown on top.
        columns: Steps to show, spread over the run.
    """
    steps = sorted({seen.step for seen in recording.observations})
    shown = [steps[round(i * (len(steps) - 1) / max(1, columns - 1))] for i in range(min(columns, len(steps)))]
    rows: list[Sequence[Cell]] = []
    titles: list[str] = []
    blank = Image.new("RGB", image.size, (238, 238, 240))
    for block in recording.blocks:
        by_step = {seen.step: seen for seen in recording.observations if seen.block == block}
        first = next(iter(by_step.values()), None)
        if first is None:
            continue
        h, w = first.size
        titles += [f"{block}   {h} x {w} tokens, {first.keep.shape[1]} kept", ""]
        rows.append(
            [
                Cell(importance_overlay(image, by_step[s]), f"step {s}")
                if s in by_step
                else Cell(blank, f"step {s}: spared")
                for s in shown
            ]
        )
        rows.append([Cell(kept_overlay(image, by_step[s])) if s in by_step else Cell(blank) for s in shown])
    return draw_sheet(
        rows, titles, headline=f"{prompt}: importance (yellow is high), then the tokens kept, per block", side=SIDE
    )
