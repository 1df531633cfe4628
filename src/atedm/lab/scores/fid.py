"""FID by clean-fid: how far a set of images is from another set.

Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, CVPR 2022. Resizing, the loop over files
and the distance are the library's; the network that looks at the images may be replaced.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atedm.app.devices import best_device
from atedm.lab.extra import optional
from atedm.lab.scores.clip_score import CLIP_WEIGHTS, image_features, open_clip_model
from atedm.lab.scores.intervals import Interval
from atedm.lab.scores.pixels import read_picture

INCEPTION = "inception"
"""The network of the FID that papers report."""


class Extractor(NamedTuple):
    """A network that looks at images."""

    network: Callable[[Tensor], Tensor]  #: Gives (B, d) for (B, 3, H, W) float images in [0, 255].
    device: torch.device
    resize: Any = None  #: Resizes images first; None is clean-fid's own way, to 299 px.


def open_extractor(name: str, pretrained: str = CLIP_WEIGHTS, device: str | None = None) -> Extractor:
    """Open "inception", which clean-fid downloads (d = 2048), or the image tower of an open_clip model.

    Raises an `ImportError` if clean-fid, or open_clip where it is asked for, is not installed, and a `ValueError` if
    the network cannot be had.
    """
    resize = optional("cleanfid.resize")
    where = torch.device(device or best_device())
    if name != INCEPTION:
        clip = open_clip_model(name, pretrained, str(where))
        size = clip.size[::-1]
        return Extractor(
            lambda pixels: image_features(clip, pixels), where, resize.make_resizer("PIL", False, "bicubic", size)
        )
    try:
        return Extractor(optional("cleanfid.features").build_feature_extractor("clean", where, False), where)
    except Exception as error:
        url = optional("cleanfid.downloads_helper").inception_url
        raise ValueError(
            f"cannot have clean-fid's Inception weights from {url}: {str(error).strip() or type(error)}; "
            "what works is a connection, that file in /tmp (clean-fid's place), or an open_clip model as the extractor"
        ) from error


def file_features(extractor: Extractor, files: Sequence[Path], batch: int = 32) -> NDArray[np.float64]:
    """Look at n images, resized by clean-fid's antialiased bicubic filter, without rounding: (n, d).

    Raises a `ValueError` if one cannot be read.
    """
    library, names = optional("cleanfid.fid"), list(map(str, files))
    options = {"num_workers": 0, "batch_size": batch, "mode": "clean", "verbose": False}
    options |= {"device": extractor.device, "custom_fn_resize": extractor.resize}
    try:
        features = library.get_files_features(names, extractor.network, **options)
    except Exception:
        for file in files:  # to name the one that is no image, if one is not
            read_picture(file)
        raise
    return np.asarray(features, dtype=np.float64)


def fid(features: NDArray[Any], references: NDArray[Any]) -> float:
    """Fréchet distance between the normal distributions fitted to (n, d) and (m, d) features, by clean-fid in float64.

    With few images it is too large: compare equally many only. Raises an `ImportError` if clean-fid is not installed,
    and a `ValueError` if the shapes do not fit, or n or m is below 2.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (features, references))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"FID needs two tables (n, d) of equal d and n >= 2, not {a.shape} and {b.shape}")
    return float(optional("cleanfid.fid").fid_from_feats(a, b))


def fid_interval(features: NDArray[Any], references: NDArray[Any], *, draws: int = 200, seed: int = 0) -> Interval:
    """Return `fid` and its 95 % interval, a bootstrap over the images of ``features`` against fixed references.

    A bootstrap sample holds images twice and so comes out farther away. That shift is known from the samples and taken
    off, which leaves their spread. The interval does not cover that FID of few images is too large. Each of the
    ``draws`` takes the eigenvalues of a (d, d) matrix: seconds for the 2048 of Inception. Raises as `fid`.
    """
    measured = fid(features, references)
    a, b = (np.asarray(x, dtype=np.float64) for x in (features, references))
    mean, covariance = b.mean(axis=0), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def distance(some: NDArray[np.float64]) -> float:
        # As `fid`, but tr √(AB) is taken from the eigenvalues of √B A √B, which is symmetric: at d = 2048 many times
        # quicker than clean-fid's square root of AB, and √B is needed once only.
        spread = np.atleast_2d(np.cov(some, rowvar=False))
        shared = np.sqrt(np.linalg.eigvalsh(root @ spread @ root).clip(0)).sum()
        shift = some.mean(axis=0) - mean
        return float(shift @ shift + np.trace(spread) + np.trace(covariance) - 2 * shared)

    rng = np.random.default_rng(seed)
    drawn = np.array([distance(a[rng.integers(0, len(a), len(a))]) for _ in range(draws)])
    low, high = np.percentile(drawn - drawn.mean() + measured, [2.5, 97.5])
    return Interval(measured, max(0.0, float(low)), float(high))  # no distance is negative
