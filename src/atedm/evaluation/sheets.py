"""Judged images to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageOps
from torch import Tensor

from atedm.pictures.canvas import Cell, draw_sheet
from atedm.tiny.classifier import Judgement
from atedm.tiny.scenes import Scene


def judged_sheet(
    scenes: Sequence[Scene], images: Tensor, judgements: Sequence[Judgement], count: int = 32, columns: int = 8
) -> Image.Image:
    """Draw the first ``count`` of (N, 3, H, W) uint8 images with their captions; a red frame marks a wrong one."""
    cells = []
    for scene, image, judgement in list(zip(scenes, images, judgements, strict=True))[:count]:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        frame = (255, 255, 255) if judgement.all_right else (220, 30, 30)
        title = "\n".join([*textwrap.wrap(scene.caption, 23), "", "", "", ""][:4])
        cells.append(Cell(ImageOps.expand(picture, 4, frame), title))
    return draw_sheet([cells[i : i + columns] for i in range(0, len(cells), columns)], side=176)
