"""Scenes as pictures: objects composited over backgrounds, in batches, on the device that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from atedm.tiny.backgrounds import paint_backgrounds
from atedm.tiny.layout import Placed, place_objects
from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import CANVAS, Scene

_ON_GROUND = ("meadow", "sea", "night", "desert", "snow", "room")
_LEVELS = (256, 128, 64, 32)


@dataclass(frozen=True)
class Atlas:
    """The pictures of all objects at falling sizes: (objects, 4, side, side) in [0, 1], premultiplied by alpha."""

    levels: tuple[Tensor, ...]

    @classmethod
    def of(cls, pictures: Tensor) -> Atlas:
        """Make the smaller sizes of (objects, 4, 256, 256) pictures with plain alpha."""
        whole = torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], dim=1)
        return cls(tuple(functional.adaptive_avg_pool2d(whole, side) for side in _LEVELS))

    def to(self, device: torch.device | str) -> Atlas:
        """Move all sizes to a device."""
        return Atlas(tuple(level.to(device) for level in self.levels))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.levels[0].device


_ROW = {name: row for row, name in enumerate(OBJECTS)}


@dataclass(frozen=True)
class Rendered:
    """Pictures of scenes."""

    #: (B, 3, canvas, canvas) float32 in [0, 1].
    images: Tensor
    #: (B, 3, canvas, canvas): how much of each pixel is the first, second and third object of the scene.
    masks: Tensor


def render(scenes: Sequence[Scene], atlas: Atlas, rng: np.random.Generator, canvas: int = CANVAS) -> Rendered:
    """Draw scenes. The same ``rng`` gives the same picture at every canvas and on every device, but for rounding.

    Args:
        scenes: What to draw.
        atlas: Of the objects, on the device that draws.
        rng: Source of places, tilts and backgrounds.
        canvas: Width and height in pixels.
    """
    device = atlas.device
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    images = paint_backgrounds([scene.background for scene in scenes], canvas, generator, device)
    masks = torch.zeros(len(scenes), 3, canvas, canvas, device=device)
    placed = [place_objects(scene, rng) for scene in scenes]
    for turn in range(max(map(len, placed))):  # from the back to the front
        rows = [i for i, objects in enumerate(placed) if turn < len(objects)]
        objects = [placed[i][turn] for i in rows]
        index = torch.tensor(rows, device=device)
        below = images[index] * (1 - _shadows(objects, [scenes[i].background for i in rows], canvas, device))
        drawn = _cut_out(objects, atlas, canvas)
        colour, alpha = drawn[:, :3], drawn[:, 3:]
        images[index] = below * (1 - alpha) + colour
        hidden = masks[index] * (1 - alpha)
        for row, i in enumerate(rows):
            hidden[row, scenes[i].objects.index(objects[row].name)] = alpha[row, 0]
        masks[index] = hidden
    return Rendered(images.clamp(0, 1), masks)


def _cut_out(objects: Sequence[Placed], atlas: Atlas, canvas: int) -> Tensor:
    """Lay pictures on empty canvases, (B, 4, canvas, canvas), between the two sizes nearest to what is asked."""
    device = atlas.device
    theta = torch.tensor([_inverse(placed) for placed in objects], dtype=torch.float32, device=device)
    grid = functional.affine_grid(theta, [len(objects), 4, canvas, canvas], align_corners=False)
    rows = torch.tensor([_ROW[placed.name] for placed in objects], device=device)
    wanted = torch.tensor([math.log2(_LEVELS[0] / (placed.side * canvas)) for placed in objects], device=device)
    level = wanted.clamp(0, len(_LEVELS) - 1)
    out = torch.zeros(len(objects), 4, canvas, canvas, device=device)
    for number, pictures in enumerate(atlas.levels):
        share = (1 - (level - number).abs()).clamp_min(0)
        some = share.nonzero().flatten()
        if len(some):
            drawn = functional.grid_sample(pictures[rows[some]], grid[some], align_corners=False)
            out[some] += share[some, None, None, None] * drawn
    return out


def _inverse(placed: Placed) -> list[list[float]]:
    """From places on the canvas to places in the picture, both from -1 to 1."""
    cos, sin = math.cos(placed.tilt) / placed.side, math.sin(placed.tilt) / placed.side
    cx, cy = 2 * placed.x - 1, 2 * placed.y - 1
    flip = -1.0 if placed.is_mirrored else 1.0
    return [
        [flip * cos, flip * sin, -flip * (cos * cx + sin * cy)],
        [-sin, cos, sin * cx - cos * cy],
    ]


def _shadows(objects: Sequence[Placed], backgrounds: Sequence[str], canvas: int, device: torch.device) -> Tensor:
    """Soft dark ellipses under objects that stand on some ground, (B, 1, canvas, canvas)."""
    numbers = torch.tensor([[p.x, p.y + 0.47 * p.side, p.side] for p in objects], device=device)
    cx, cy, side = (n[:, None, None, None] for n in numbers.unbind(1))
    shades = [0.3 if name in _ON_GROUND else 0.12 for name in backgrounds]
    strength = torch.tensor([shade * p.stands for shade, p in zip(shades, objects, strict=True)], device=device)
    axis = (torch.arange(canvas, device=device, dtype=torch.float32) + 0.5) / canvas
    y, x = axis[None, None, :, None], axis[None, None, None, :]
    distance = ((x - cx) / (0.36 * side)) ** 2 + ((y - cy) / (0.07 * side)) ** 2
    return strength[:, None, None, None] * torch.exp(-distance / 2)
