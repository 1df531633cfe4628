"""LPIPS, the perceptual distance between two pictures, by the package of its authors."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atedm.evaluation.pixels import read_pixels
from atedm.pipelines import best_device

NETS = ("alex", "vgg", "squeeze")


def lpips_model(net: str = "alex", device: str | None = None) -> Any:
    """Open the network that LPIPS compares features of. Torchvision downloads it when it is first used.

    Args:
        net: One of `NETS`; "alex" is what its authors report distances with.
        device: Where it runs; None is the fastest there is.

    Raises:
        ImportError: If lpips is not installed.
        ValueError: If there is no such network, or its weights are neither here nor to be downloaded.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError("LPIPS needs its package: pip install 'atedm[evaluate]'") from error
    if net not in NETS:
        raise ValueError(f"LPIPS has no network {net!r}; known are {', '.join(NETS)}")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # of arguments that torchvision no longer likes
            model = lpips.LPIPS(net=net, verbose=False)
    except OSError as error:
        raise ValueError(
            f"LPIPS needs torchvision's weights of {net}, which are not in {torch.hub.get_dir()}/checkpoints and "
            f"cannot be downloaded: {error}; leave lpips out of --metrics"
        ) from error
    return model.eval().to(device or best_device())


@torch.inference_mode()
def lpips_distances(
    files: Sequence[Path], references: Sequence[Path], *, net: str = "alex", device: str | None = None
) -> list[float]:
    """LPIPS of each picture to its reference: 0 where they are equal, more where they look less alike.

    Args:
        files: n pictures.
        references: n pictures of the same sizes.
        net: See `lpips_model`.
        device: See `lpips_model`.

    Returns:
        n distances, computed in float32.

    Raises:
        ImportError: As `lpips_model`.
        ValueError: As `lpips_model`, or if a file is no picture.
    """
    model = lpips_model(net, device)
    where = next(model.parameters()).device

    def prepared(file: Path) -> torch.Tensor:
        return read_pixels(file).to(where, torch.float32).unsqueeze(0) / 127.5 - 1

    return [
        float(model(prepared(file), prepared(reference))) for file, reference in zip(files, references, strict=True)
    ]
