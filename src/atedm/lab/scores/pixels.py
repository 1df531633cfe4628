"""Pixels of pictures, and how far apart they are: PSNR, and LPIPS by the package of its authors."""

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atedm.app.devices import best_device
from atedm.app.pictures.comparison import psnr
from atedm.lab.extra import optional


def read_picture(file: Path) -> Image.Image:
    """Open a picture in RGB.

    Raises a `ValueError` if it cannot be read; the message names it.
    """
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error


def read_pixels(file: Path, side: int | None = None) -> Tensor:
    """Return the (3, H, W) uint8 pixels of a picture, scaled to a square of ``side`` pixels if one is given.

    Raises a `ValueError` if it cannot be read.
    """
    picture = read_picture(file)
    if side is not None and picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def distances(files: Sequence[Path], references: Sequence[Path]) -> list[float]:
    """Return the PSNR in dB of each picture to its reference, 99 where they are equal.

    Raises a `ValueError` if one cannot be read, or two differ in size.
    """
    found = []
    for file, reference in zip(files, references, strict=True):
        ours, theirs = read_picture(file), read_picture(reference)
        if ours.size != theirs.size:
            sizes = [f"{picture.width} x {picture.height}" for picture in (ours, theirs)]
            raise ValueError(f"{file} has {sizes[0]} pixels, {reference} has {sizes[1]}; remove the one that is wrong")
        found.append(min(psnr(ours, theirs), 99.0))
    return found


def lpips_model(device: str | None = None) -> Any:
    """Open the network that LPIPS compares features of: AlexNet, which its authors report distances with.

    Raises an `ImportError` if lpips is not installed, and a `ValueError` if torchvision's weights are neither here nor
    to be downloaded.
    """
    lpips = optional("lpips")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of arguments that torchvision no longer likes
            model = lpips.LPIPS(net="alex", verbose=False)
    except OSError as error:
        raise ValueError(
            f"LPIPS needs torchvision's weights of alex, which are not in {torch.hub.get_dir()}/checkpoints and "
            f"cannot be downloaded: {error}; leave lpips out of --metrics"
        ) from error
    return model.eval().to(device or best_device())


@torch.inference_mode()
def lpips_distances(files: Sequence[Path], references: Sequence[Path], *, device: str | None = None) -> list[float]:
    """Return the LPIPS of each of n pictures to its reference of the same size: 0 where they are equal.

    Raises as `lpips_model`, or a `ValueError` if a file is no picture.
    """
    model = lpips_model(device)
    where = next(model.parameters()).device

    def prepared(file: Path) -> Tensor:
        return read_pixels(file).to(where, torch.float32).unsqueeze(0) / 127.5 - 1

    pairs = zip(files, references, strict=True)
    return [float(model(prepared(file), prepared(reference))) for file, reference in pairs]
