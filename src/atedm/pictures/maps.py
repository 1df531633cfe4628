"""What was important and what was kept, drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from atedm.patching.state import BlockObservation
from atedm.pictures.canvas import Cell, draw_sheet
from atedm.recording import Recording

SIDE = 104
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


def maps_sheet(image: Image.Image, recording: Recording, prompt: str, steps_shown: int = 6) -> Image.Image:
    """Draw importance, and under it the kept tokens, of every block at a few steps.

    Args:
        image: The finished image.
        recording: What was recorded while it was made.
        prompt: Shown on top.
        steps_shown: Steps to show, spread over the run.
    """
    steps = sorted({seen.step for seen in recording.observations})
    last = len(steps) - 1
    shown = sorted({steps[round(i * last / max(1, steps_shown - 1))] for i in range(steps_shown)})
    parts = []
    for block in recording.blocks:
        by_step = {seen.step: seen for seen in recording.observations if seen.block == block}
        if by_step:
            parts.append(Cell(_block_strip(image, block, by_step, shown)))
    rows = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    headline = f"Importance (yellow is high) and the tokens kept, per block and step: {prompt}"
    return draw_sheet(rows, headline=headline, side=max(max(part.picture.size) for part in parts))


def _block_strip(
    image: Image.Image, block: str, by_step: dict[int, BlockObservation], steps: Sequence[int]
) -> Image.Image:
    """Draw one block: a column a step, importance over kept tokens."""
    first = next(iter(by_step.values()))
    height, width = first.size
    cells = []
    for step in steps:
        seen = by_step.get(step)
        pair = Image.new("RGB", (image.width, 2 * image.height), (238, 238, 240))
        if seen is not None:
            pair.paste(importance_overlay(image, seen), (0, 0))
            pair.paste(kept_overlay(image, seen), (0, image.height))
        cells.append(Cell(pair, f"step {step}" + (": spared" if seen is None else "")))
    title = f"{block}   {height} x {width} tokens, {first.keep.shape[1]} kept"
    side = round(SIDE * max(2 * image.height, image.width) / image.width)
    return draw_sheet([cells], [title], side=side, gap=6)
