"""Backgrounds with structure, painted in batches on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Of each background: colours at the top, above the horizon, below it, and at the bottom, 0 to 255.
_COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "meadow": ((96, 176, 240), (196, 230, 250), (120, 196, 84), (58, 140, 52)),
    "sea": ((130, 200, 245), (222, 240, 250), (40, 140, 190), (20, 84, 140)),
    "night": ((14, 16, 52), (44, 40, 98), (34, 34, 62), (18, 18, 36)),
    "desert": ((250, 196, 120), (253, 232, 190), (232, 178, 104), (198, 136, 70)),
    "snow": ((168, 190, 214), (222, 232, 242), (246, 250, 254), (216, 228, 242)),
    "room": ((232, 214, 190), (222, 200, 172), (166, 116, 78), (128, 84, 54)),
    "pink": ((255, 214, 226), (248, 176, 200), (248, 176, 200), (236, 140, 176)),
    "blue": ((190, 220, 252), (140, 188, 244), (140, 188, 244), (96, 150, 224)),
    "yellow": ((255, 244, 190), (252, 226, 130), (252, 226, 130), (242, 200, 80)),
    "gray": ((226, 228, 232), (190, 194, 200), (190, 194, 200), (150, 154, 162)),
}


def paint_backgrounds(names: list[str], canvas: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Paint a background for each name.

    Args:
        names: Of `atedm.tiny.scenes.BACKGROUNDS`.
        canvas: Width and height in pixels.
        generator: On the CPU; the numbers are the same for every device and canvas.
        device: Where to paint.

    Returns:
        (B, 3, canvas, canvas) float32 in [0, 1].
    """
    batch = len(names)
    chance = torch.rand(batch, 8, generator=generator).to(device)[:, :, None, None]
    colours = torch.tensor([_COLOURS[name] for name in names], dtype=torch.float32, device=device) / 255
    top, above, below, bottom = (c[:, :, None, None] for c in colours.unbind(1))
    axis = (torch.arange(canvas, device=device, dtype=torch.float32) + 0.5) / canvas
    y, x = axis[None, None, :, None], axis[None, None, None, :]
    horizon = 0.42 + 0.18 * chance[:, 0:1]  # objects stand below it
    # Hills: waves along x whose height and phase are by chance.
    hills = 0.03 * torch.sin(2 * math.pi * (x * (1 + 2 * chance[:, 1:2]) + chance[:, 2:3]))
    kinds = {
        name: torch.tensor([float(n == name) for n in names], device=device)[:, None, None, None] for name in set(names)
    }
    zero = torch.zeros(batch, 1, 1, 1, device=device)

    def is_(*wanted: str) -> Tensor:
        return sum((kinds.get(name, zero) for name in wanted), zero)

    edge = horizon + hills * is_("meadow", "desert", "snow")
    sharp = 0.008 + 0.5 * is_("pink", "blue", "yellow", "gray")
    ground = torch.sigmoid((y - edge) / sharp * 4)
    up = (y / edge).clamp(0, 1)
    down = ((y - edge) / (1 - edge)).clamp(0, 1)
    image = (top + (above - top) * up) * (1 - ground) + (below + (bottom - below) * down) * ground
    depth = 0.6 + 0.6 * down  # what lies on the ground is finer towards the horizon
    waves = torch.sin(2 * math.pi * (9 * y * depth + 0.5 * torch.sin(7 * x + 6 * chance[:, 3:4]) + chance[:, 4:5]))
    image = image * (1 + 0.10 * waves * ground * is_("sea")) * (1 + 0.05 * waves * ground * is_("desert", "snow"))
    blades = torch.sin(2 * math.pi * (9 * x + torch.sin(13 * y + 6 * chance[:, 3:4]))) * torch.sin(30 * y * depth)
    image = image * (1 + 0.08 * blades * ground * is_("meadow"))
    boards = torch.sigmoid(60 * (torch.cos(2 * math.pi * ((x - 0.5) / (0.35 + 3 * down) * 4 + chance[:, 4:5])) - 0.97))
    paper = torch.sigmoid(30 * (torch.cos(2 * math.pi * (9 * x + chance[:, 5:6])) - 0.6))
    image = image * (1 - 0.25 * boards * ground * is_("room")) * (1 - 0.06 * paper * (1 - ground) * is_("room"))
    image = image + is_("night") * (1 - ground) * _stars(batch, x, y, generator, device)
    return image.clamp(0, 1)


def _stars(
    batch: int, x: Tensor, y: Tensor, generator: torch.Generator, device: torch.device, count: int = 24
) -> Tensor:
    """Soft dots at random places of the sky, (B, 1, h, w)."""
    places = torch.rand(batch, count, 3, generator=generator).to(device)
    light = torch.zeros(batch, 1, y.shape[2], x.shape[3], device=device)
    for cx, cy, size in places.permute(1, 2, 0):
        radius = (0.004 + 0.006 * size)[:, None, None, None]
        squares = (x - cx[:, None, None, None]) ** 2 + (y - 0.7 * cy[:, None, None, None]) ** 2
        light = light + torch.exp(-squares / (2 * radius**2))
    return 0.9 * light
