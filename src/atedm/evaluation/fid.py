"""FID by clean-fid: how far the images of a folder are, as a crowd, from those of another.

Parmar et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, CVPR 2022. Resizing, the loop over files
and the distance are the library's; only what looks at the images may be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from atedm.evaluation.captions import Progress
from atedm.evaluation.clip_score import CLIP_WEIGHTS, image_features, open_clip_model
from atedm.evaluation.statistics import Interval
from atedm.pipelines import best_device

INCEPTION = "inception"
"""The network of the FID papers report."""
Extractor = Callable[[Tensor], Tensor]
"""Looks at (B, 3, H, W) float images in [0, 255] and gives (B, d)."""


def folder_features(folder: str | Path, extractor: str | Extractor = INCEPTION, **options: Any) -> NDArray[np.float64]:
    """Look at every image of a folder and its subfolders, as `file_features` does.

    Args:
        folder: What holds the images, as png, jpg, webp, bmp, tiff or ppm.
        extractor: What looks at them.
        **options: Of `file_features`.

    Returns:
        (n, d), rows in the order of the sorted file names.

    Raises:
        ImportError: As `file_features`.
        ValueError: As `file_features`, or if there is no image.
    """
    _clean_fid()
    return file_features(_images(Path(folder)), extractor, **options)


def file_features(
    files: Sequence[str | Path],
    extractor: str | Extractor = INCEPTION,
    *,
    pretrained: str = CLIP_WEIGHTS,
    device: str | None = None,
    batch: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Look at images.

    Args:
        files: Where they lie.
        extractor: "inception" for clean-fid's own network (downloaded by clean-fid, d = 2048); a model as
            `open_clip_model` takes it, such as "local-dir:FOLDER", for the image tower of that; or anything that looks
            at images. Images are resized by clean-fid's antialiased bicubic filter, without rounding: to 299 px, or to
            the size of the image tower.
        pretrained: Weights of an open_clip model given by name.
        device: By default CUDA, else MPS, else the CPU.
        batch: Images looked at together.
        workers: Processes that read and resize images; with 0 it is done in this one.
        progress: Called with the number of images looked at since the last call.

    Returns:
        (n, d), rows in the order of the files.

    Raises:
        ImportError: If clean-fid, or open_clip where it is asked for, is not installed.
        ValueError: If one cannot be read, or the network cannot be had.
    """
    fid_library, resize = _clean_fid()
    names = [str(file) for file in files]
    where = device or best_device()
    looks_at, custom_resize = _extractor(extractor, pretrained, where, resize)

    def counted(images: Tensor) -> Tensor:
        features = looks_at(images)
        if progress is not None:
            progress(len(images))
        return features

    try:
        features = fid_library.get_files_features(
            names,
            counted,
            num_workers=workers,
            batch_size=batch,
            device=torch.device(where),
            mode="clean",
            custom_fn_resize=custom_resize,
            verbose=False,
        )
    except Exception as error:
        _name_unreadable(names, error)
        raise
    return np.asarray(features, dtype=np.float64)


def check_features(extractor: str, pretrained: str = CLIP_WEIGHTS, *, device: str | None = None) -> None:
    """Open what looks at images once, as `folder_features` will, and let go of it.

    Raises:
        ImportError: If clean-fid is not installed.
        ValueError: If the extractor cannot be opened.
    """
    _extractor(extractor, pretrained, device or best_device(), _clean_fid()[1])


def fid(features: NDArray[Any], reference_features: NDArray[Any]) -> float:
    """Fréchet distance between the normal distributions fitted to two sets of features, by clean-fid in float64.

    With fewer images than d a covariance is singular, and with few images at all the distance is too large: compare
    distances of equally many images only.

    Args:
        features: (n, d), n at least 2.
        reference_features: (m, d), m at least 2.

    Raises:
        ImportError: If clean-fid is not installed.
        ValueError: If the shapes do not fit.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (features, reference_features))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"FID needs two tables (n, d) of equal d and n >= 2, not {a.shape} and {b.shape}")
    return float(_clean_fid()[0].fid_from_feats(a, b))


def fid_interval(
    features: NDArray[Any], reference_features: NDArray[Any], *, draws: int = 200, seed: int = 0
) -> Interval:
    """FID and how much it owes to which images happened to be made: a bootstrap over the images of ``features``.

    The ends say where FID would come out for other images from the same source, as many as these, against these very
    references. They do not cover that FID of few images is too large (it is so for every draw, so two equally large
    sets still compare), nor the choice of the references. A draw holds images twice and so comes out larger still;
    that shift, known from the draws, is taken off, which leaves their spread. Where the two distributions are the same,
    the bootstrap is no guide and the interval is too wide.

    Args:
        features: (n, d), n at least 2.
        reference_features: (m, d), m at least 2.
        draws: Bootstrap samples. Each costs the eigenvalues of a (d, d) matrix: nothing for the 64 features of the
            shipped CLIP, seconds for the 2048 of Inception.
        seed: Seed of the resampling.

    Returns:
        FID as `fid` gives it, and its 95 % interval.

    Raises:
        ImportError: If clean-fid is not installed.
        ValueError: If the shapes do not fit.
    """
    measured = fid(features, reference_features)
    a, b = (np.asarray(x, dtype=np.float64) for x in (features, reference_features))
    rng = np.random.default_rng(seed)
    to_references = _distance_to(b)
    drawn = np.array([to_references(a[rng.integers(0, len(a), len(a))]) for _ in range(draws)])
    low, high = np.percentile(drawn - drawn.mean() + measured, [2.5, 97.5])
    return Interval(measured, max(0.0, float(low)), float(high))  # no distance is negative, however few the images


def _distance_to(references: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], float]:
    """Fréchet distance to (m, d) features, again and again.

    What `fid` gives, but tr √(AB) is taken from the eigenvalues of √B A √B, which is symmetric: at d = 2048 that is
    many times quicker than clean-fid's square root of AB, and it needs √B once only.
    """
    mean, covariance = references.mean(axis=0), np.atleast_2d(np.cov(references, rowvar=False))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def distance(features: NDArray[np.float64]) -> float:
        spread = np.atleast_2d(np.cov(features, rowvar=False))
        shared = np.sqrt(np.linalg.eigvalsh(root @ spread @ root).clip(0)).sum()
        shift = features.mean(axis=0) - mean
        return float(shift @ shift + np.trace(spread) + np.trace(covariance) - 2 * shared)

    return distance


def _clean_fid() -> tuple[Any, Any]:
    try:
        from cleanfid import fid as library
        from cleanfid import resize
    except ImportError as error:
        raise ImportError("FID needs the clean-fid package: pip install 'atedm[evaluate]'") from error
    return library, resize


def _images(folder: Path) -> list[str]:
    """Return the files clean-fid would look at, but for arrays, which are no images."""
    from cleanfid.utils import EXTENSIONS

    found = sorted(
        str(file) for file in folder.rglob("*") if file.suffix[1:] in EXTENSIONS - {"npy"} and file.is_file()
    )
    if not found:
        raise ValueError(f"no images in {folder}" if folder.is_dir() else f"no folder at {folder}")
    return found


def _extractor(extractor: str | Extractor, pretrained: str, device: str, resize: Any) -> tuple[Extractor, Any]:
    """Return what looks at images, and what resizes them first if 299 px is not right."""
    if not isinstance(extractor, str):
        return extractor, None
    if extractor == INCEPTION:
        return _inception(device), None
    clip = open_clip_model(extractor, pretrained, device)
    height, width = clip.size
    return lambda pixels: image_features(clip, pixels), resize.make_resizer("PIL", False, "bicubic", (width, height))


def _inception(device: str) -> Extractor:
    from cleanfid.features import build_feature_extractor

    try:
        network: Extractor = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
    except Exception as error:
        from cleanfid.downloads_helper import inception_url

        raise ValueError(
            f"cannot have clean-fid's Inception weights from {inception_url}: {str(error).strip() or type(error)}; "
            "what works is a connection, that file in /tmp (clean-fid's place), or an open_clip model as the extractor"
        ) from error
    return network


def _name_unreadable(files: list[str], error: Exception) -> None:
    """Raise a ValueError that names the first file which is no image, if there is one."""
    for file in files:
        try:
            with Image.open(file) as image:
                image.convert("RGB")
        except Exception as unreadable:
            reason = (str(unreadable).strip() or type(unreadable).__name__).splitlines()[0]
            raise ValueError(f"cannot read the image {file}: {reason}") from error
