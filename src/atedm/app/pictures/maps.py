"""Importance and kept tokens, drawn over the image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atedm.app.pictures.canvas import Cell, draw_sheet
from atedm.hosts.state import Observation
from atedm.record import Recording

SIDE = 104
"""Side of one map on a sheet, in pixels."""
STEPS = 6
"""How many steps a sheet shows, spread over the run."""
_VIRIDIS = np.array(
    [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
     [170, 220, 50], [253, 231, 37]]
)  # fmt: skip
"""Colours from the least to the most, evenly spaced: matplotlib's viridis."""


def kept_overlay(image: Image.Image, seen: Observation) -> Image.Image:
    """Dim the tokens that were dropped from the last image of a batch, which with guidance has the prompt."""
    return _dim(image, _kept_grid(seen))


def importance_overlay(image: Image.Image, seen: Observation) -> Image.Image:
    """Colour the image by the rank of each token: dark blue is the least important, yellow the most."""
    importance = seen.importance[-1].numpy()
    rank = importance.argsort(kind="stable").argsort(kind="stable") / max(1, importance.size - 1)
    stops = np.linspace(0, 1, len(_VIRIDIS))
    heat = np.stack([np.interp(rank, stops, channel) for channel in _VIRIDIS.T], axis=-1).reshape(*seen.size, 3)
    grid = Image.fromarray(heat.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), grid, 0.65)


def mean_kept_overlay(image: Image.Image, recording: Recording) -> Image.Image:
    """Dim each place by how often its tokens were dropped, over all blocks and steps."""
    if not recording.observations:
        return image.convert("RGB")
    height, width = np.array([seen.size for seen in recording.observations]).max(axis=0)
    total = np.zeros((height, width), dtype=np.float32)
    for seen in recording.observations:
        grid = Image.fromarray(_kept_grid(seen)).resize((width, height), Image.Resampling.NEAREST)
        total += np.asarray(grid)
    share = (total / len(recording.observations)).astype(np.float32)
    low, high = float(share.min()), float(share.max())
    return _dim(image, (share - np.float32(low)) / np.float32(max(1e-6, high - low)))


def _kept_grid(seen: Observation) -> NDArray[np.float32]:
    """Return (h, w) of 1 where a token was kept and 0 where it was dropped."""
    kept = np.zeros(seen.size[0] * seen.size[1], dtype=np.float32)
    kept[seen.keep[-1].numpy()] = 1
    return kept.reshape(seen.size)


def _dim(image: Image.Image, light: NDArray[np.float32]) -> Image.Image:
    """Darken and grey the places where ``light`` (h, w) in [0, 1] is low."""
    mask = Image.fromarray((light * 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    dark = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, (18, 18, 34)), 0.78)
    return Image.composite(image.convert("RGB"), dark, mask)


def maps_sheet(image: Image.Image, recording: Recording, prompt: str) -> Image.Image:
    """Draw the importance and the kept tokens of every block over the image, at a few steps, under its prompt."""
    steps = sorted({seen.step for seen in recording.observations})
    last = len(steps) - 1
    shown = sorted({steps[round(i * last / (STEPS - 1))] for i in range(STEPS)})
    parts = []
    for block in recording.blocks:
        by_step = {seen.step: seen for seen in recording.observations if seen.block == block}
        if by_step:
            parts.append(Cell(_block_strip(image, block, by_step, shown)))
    rows = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    headline = f"Importance (yellow is high) and the tokens kept, per block and step: {prompt}"
    return draw_sheet(rows, headline=headline, side=max(max(part.picture.size) for part in parts))


def _block_strip(image: Image.Image, block: str, by_step: dict[int, Observation], steps: Sequence[int]) -> Image.Image:
    """Draw one block: a column for each step, importance above kept tokens."""
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
