"""From folders of images to figures with intervals. CLIP scores and features of FID are kept beside the images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atedm.files import read_json, save_json
from atedm.lab.evaluation.images import image_file
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.scores.clip_score import CLIP_MODEL, CLIP_WEIGHTS, clip_scores, open_clip_model
from atedm.lab.scores.fid import INCEPTION, fid_interval, file_features, open_extractor
from atedm.lab.scores.intervals import Interval, mean_interval, ratio_interval
from atedm.lab.scores.judge import ALL, columns, judge_images
from atedm.lab.scores.lpips_distance import lpips_distances, lpips_model
from atedm.lab.scores.pixels import distances, read_pixels
from atedm.tiny.scenes import CANVAS

DISTANCE, ACCURACY, CLIP, FID, LPIPS = METRICS = ("distance", "accuracy", "clip", "fid", "lpips")
COLUMNS = {
    DISTANCE: ("distance to dense, dB", 1.0, 1),
    ACCURACY: ("captions right in everything, %", 100.0, 1),
    CLIP: ("CLIP score", 1.0, 4),
    FID: ("FID", 1.0, 2),
    LPIPS: ("LPIPS to dense", 1.0, 4),
}
"""Title, factor and digits of each figure."""
PACKAGES = {CLIP: "open_clip", FID: "cleanfid", LPIPS: "lpips"}
"""What a metric needs of the extra ``lab``."""


@dataclass(frozen=True)
class Metrics:
    """Which figures are taken, and by which models."""

    names: tuple[str, ...] = METRICS[:4]
    #: An open_clip model, and its weights.
    clip_model: str = CLIP_MODEL
    clip_pretrained: str = CLIP_WEIGHTS
    #: Features that FID compares: "inception", or an open_clip model, with the same weights.
    fid_features: str = INCEPTION

    @property
    def to_dense(self) -> bool:
        """Whether one of them compares with the dense images."""
        return DISTANCE in self.names or LPIPS in self.names


@dataclass(frozen=True)
class Scores:
    """Figures of one method."""

    #: By metric (distance, LPIPS, CLIP score), one figure an image.
    per_image: dict[str, list[float]] = field(default_factory=dict)
    #: By attribute and for all of them, (right, asked) per image.
    accuracy: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    fid: Interval | None = None

    def intervals(self) -> dict[str, Interval]:
        """Sum up by metric, with 95 % intervals by bootstrap over images."""
        found = {name: mean_interval(values) for name, values in self.per_image.items()}
        if self.accuracy:
            found[ACCURACY] = ratio_interval(*self.accuracy[ALL])
        if self.fid is not None:
            found[FID] = self.fid
        return {name: found[name] for name in METRICS if name in found}

    def attributes(self) -> dict[str, Interval]:
        """Share right of what was asked, by attribute."""
        return {name: ratio_interval(*pair) for name, pair in self.accuracy.items() if sum(pair[1])}

    def difference(self, other: Scores) -> dict[str, Interval]:
        """Paired differences to another method on the same prompts and noise: this minus the other."""
        pairs = {name: (values, other.per_image.get(name)) for name, values in self.per_image.items()}
        if self.accuracy and other.accuracy:
            pairs[ACCURACY] = ([*map(float, self.accuracy[ALL][0])], [*map(float, other.accuracy[ALL][0])])
        return {name: mean_interval(np.subtract(a, b)) for name, (a, b) in pairs.items() if b is not None}


def score(
    folder: Path,
    prompts: Sequence[Prompt],
    metrics: Metrics,
    *,
    dense: Path | None = None,
    references: Path | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> Scores:
    """Score the images of one method. What was scored before under the same terms is read back.

    Args:
        folder: Where images 0 to N-1 are.
        prompts: N of them.
        metrics: Which figures, by which models.
        dense: Folder of the dense images; None for dense itself.
        references: Folder of real pictures, for FID.
        device: Where networks run.
        progress: Told what is being scored.

    Raises:
        ImportError: If a package is missing.
        ValueError: If an image is missing or cannot be read, or the weights of a metric cannot be had.
    """
    files = [image_file(folder, index) for index in range(len(prompts))]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} images, such as {missing[0]}")
    per_image: dict[str, list[float]] = {}
    accuracy: dict[str, tuple[list[int], list[int]]] = {}
    fid = None
    dense_files = [] if dense is None else [image_file(dense, index) for index in range(len(prompts))]
    scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
    for metric in metrics.names:
        progress(metric)
        if metric == DISTANCE and dense_files:
            per_image[metric] = distances(files, dense_files)
        elif metric == LPIPS and dense_files:
            per_image[metric] = lpips_distances(files, dense_files, device=device)
        elif metric == ACCURACY and len(scenes) == len(prompts):
            accuracy = columns(judge_images(scenes, torch.stack([read_pixels(file, CANVAS) for file in files])))
        elif metric == CLIP:
            per_image[metric] = _clip(files, prompts, metrics, device)
        elif metric == FID and references is not None:
            theirs = [image_file(references, index) for index in range(len(prompts))]
            fid = fid_interval(_features(files, metrics, device), _features(theirs, metrics, device))
    return Scores(per_image, accuracy, fid)


def check_metrics(metrics: Metrics, device: str, *, has_references: bool = True) -> None:
    """Open every model that the metrics need, so that what is missing is told before anything is drawn.

    Args:
        metrics: Which figures, by which models.
        device: Where to open them.
        has_references: Whether there are real pictures, without which FID is not taken.

    Raises:
        ImportError: If a package is missing.
        ValueError: If weights cannot be had.
    """
    if CLIP in metrics.names:
        open_clip_model(metrics.clip_model, metrics.clip_pretrained, device)
    if FID in metrics.names and has_references:
        open_extractor(metrics.fid_features, metrics.clip_pretrained, device)
    if LPIPS in metrics.names:
        lpips_model(device)


def _clip(files: Sequence[Path], prompts: Sequence[Prompt], metrics: Metrics, device: str) -> list[float]:
    model, weights = metrics.clip_model, metrics.clip_pretrained
    texts = [prompt.text for prompt in prompts]

    def take() -> list[float]:
        return clip_scores(files, texts, model=model, pretrained=weights, device=device)

    return list(_kept(files, "clip.json", {"model": model, "pretrained": weights}, take))


def _features(files: Sequence[Path], metrics: Metrics, device: str) -> Any:
    extractor, weights = metrics.fid_features, metrics.clip_pretrained

    def take() -> list[list[float]]:
        found: list[list[float]] = file_features(files, extractor, pretrained=weights, device=device).tolist()
        return found

    return np.asarray(_kept(files, "features.json", {"extractor": extractor, "pretrained": weights}, take))


def _kept(files: Sequence[Path], name: str, terms: dict[str, Any], take: Callable[[], Any]) -> Any:
    """Read back what was taken of the same images under the same terms, or take it and keep it beside them."""
    checksum = 0
    for file in files:
        checksum = zlib.crc32(file.read_bytes(), checksum)
    terms = {**terms, "files": checksum}
    cache = files[0].parent / name
    stored = read_json(cache) if cache.exists() else {}
    if stored.get("terms") != terms or "found" not in stored:
        stored = {"terms": terms, "found": take()}
        save_json(stored, cache)
    return stored["found"]
