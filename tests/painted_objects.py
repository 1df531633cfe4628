"""Discs of a colour each in place of the objects' pictures, which are fetched for training only."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from atedm.files import written_whole
from atedm.tiny.objects import OBJECTS


def discs() -> Tensor:
    """(objects, 4, 256, 256) in [0, 1], with plain alpha."""
    axis = (torch.arange(256) - 127.5) / 128
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 < 0.8).float()
    colours = torch.rand(len(OBJECTS), 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 256, 256)
    return torch.cat([colours, disc.expand(len(OBJECTS), 1, 256, 256)], dim=1)


def keep_discs(folder: Path) -> None:
    """Put the discs where `atedm.tiny.download.load_atlas` looks for the objects, if nothing is there."""
    file = folder / f"objects-{len(OBJECTS)}.safetensors"
    if not file.exists():
        with written_whole(file) as partial:
            save_file({"pictures": (discs() * 255).round().to(torch.uint8)}, partial)
