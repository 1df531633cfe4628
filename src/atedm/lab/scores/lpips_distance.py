"""LPIPS, the perceptual distance between two pictures, by the package of its authors."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atedm.app.devices import best_device
from atedm.lab.extra import optional
from atedm.lab.scores.pixels import read_pixels


def lpips_model(device: str | None = None) -> Any:
    """Open the network that LPIPS compares features of: AlexNet, which its authors report distances with.

    Raises:
        ImportError: If lpips is not installed.
        ValueError: If torchvision's weights are neither here nor to be downloaded.
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

    Raises:
        ImportError: As `lpips_model`.
        ValueError: As `lpips_model`, or if a file is no picture.
    """
    model = lpips_model(device)
    where = next(model.parameters()).device

    def prepared(file: Path) -> Tensor:
        return read_pixels(file).to(where, torch.float32).unsqueeze(0) / 127.5 - 1

    pairs = zip(files, references, strict=True)
    return [float(model(prepared(file), prepared(reference))) for file, reference in pairs]
