"""Held-out scenes rendered from the real objects, kept as one picture, because the objects have to be fetched.

`python tests/rendered_scenes.py` draws it again. The objects are Microsoft's Fluent Emoji (MIT).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atedm.tiny.download import load_atlas, objects_folder
from atedm.tiny.rendering import render
from atedm.tiny.scenes import CANVAS, Scene, held_out_scenes

SHEET = Path(__file__).parent / "data" / "scenes.webp"
SIDE = 6
"""Scenes a row, and rows."""


def rendered_scenes() -> tuple[list[Scene], Tensor]:
    """36 scenes and their pictures (36, 3, 256, 256) in [0, 1]."""
    with Image.open(SHEET) as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB"))).permute(2, 0, 1).float() / 255
    tiles = pixels.unflatten(1, (SIDE, CANVAS)).unflatten(3, (SIDE, CANVAS))  # (3, row, y, column, x)
    return _scenes(), tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _scenes() -> list[Scene]:
    return held_out_scenes(SIDE**2, seed=11)


if __name__ == "__main__":
    images = render(_scenes(), load_atlas(objects_folder()), np.random.default_rng(11)).images
    rows = [torch.cat([*row], dim=2) for row in torch.split(images, SIDE)]
    pixels = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(SHEET, quality=90, method=6)
