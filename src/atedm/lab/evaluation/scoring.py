"""From folders of images to figures with intervals. CLIP scores and features of FID are kept beside the images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atedm.files import read_json, save_json
from atedm.lab.evaluation.images import image_files
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.scores.clip_score import CLIP_MODEL, CLIP_WEIGHTS, clip_scores, open_clip_model
from atedm.lab.scores.fid import INCEPTION, fid_interval, file_features, open_extractor
from atedm.lab.scores.intervals import Interval, mean_interval, ratio_interval
from atedm.lab.scores.pixels import distances, lpips_distances, lpips_model, read_pixels
from atedm.tiny import weights_folder
from atedm.tiny.judge import ATTRIBUTES, JUDGE, judge, load_judge
from atedm.tiny.scenes import CANVAS, Scene

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
ALL = "all"
"""Everything that a caption says at once."""


@dataclass(frozen=True)
class Metrics:
    """Which figures are taken, and by which models."""

    names: tuple[str, ...] = METRICS[:4]
    clip_model: str = CLIP_MODEL  #: An open_clip model, and its weights.
    clip_pretrained: str = CLIP_WEIGHTS
    #: Features that FID compares: "inception", or an open_clip model, with the same weights.
    fid_features: str = INCEPTION

    def check(self, device: str, *, has_references: bool) -> None:
        """Open every model that is needed, so that what is missing is told before anything is drawn.

        Raises an `ImportError` if a package is missing, and a `ValueError` if weights cannot be had.
        """
        if CLIP in self.names:
            open_clip_model(self.clip_model, self.clip_pretrained, device)
        if FID in self.names and has_references:
            open_extractor(self.fid_features, self.clip_pretrained, device)
        if LPIPS in self.names:
            lpips_model(device)


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
    """Score the N images of one method against N prompts. What was scored before under the same terms is read back.

    ``dense`` and ``references`` are folders of the dense images and of real pictures, which some metrics need; without
    them these are left out. ``progress`` is told each metric. Raises an `ImportError` if a package is missing, and a
    `ValueError` if an image is missing or cannot be read, or the weights of a metric cannot be had.
    """
    count = len(prompts)
    files, dense_files, real_files = ([] if f is None else image_files(f, count) for f in (folder, dense, references))
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{folder} lacks {len(missing)} of {count} images, such as {missing[0]}")
    scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
    of_clip, of_fid = ((model, metrics.clip_pretrained) for model in (metrics.clip_model, metrics.fid_features))

    def clip() -> list[float]:
        return clip_scores(open_clip_model(*of_clip, device), files, [prompt.text for prompt in prompts])

    def features(files: Sequence[Path]) -> Any:
        def take() -> Any:
            return file_features(open_extractor(*of_fid, device), files).tolist()

        return np.asarray(_kept(files, "features.json", of_fid, take))

    per_image: dict[str, list[float]] = {}
    accuracy: dict[str, tuple[list[int], list[int]]] = {}
    fid = None
    for metric in metrics.names:
        progress(metric)
        if metric == DISTANCE and dense_files:
            per_image[metric] = distances(files, dense_files)
        elif metric == LPIPS and dense_files:
            per_image[metric] = lpips_distances(files, dense_files, device=device)
        elif metric == ACCURACY and len(scenes) == count:
            accuracy = caption_accuracy(scenes, torch.stack([read_pixels(file, CANVAS) for file in files]))
        elif metric == CLIP:
            per_image[metric] = _kept(files, "clip.json", of_clip, clip)
        elif metric == FID and real_files:
            fid = fid_interval(features(files), features(real_files))
    return Scores(per_image, accuracy, fid)


def caption_accuracy(scenes: Sequence[Scene], images: Tensor) -> dict[str, tuple[list[int], list[int]]]:
    """Judge (N, 3, 256, 256) uint8 images against the N scenes they were drawn from.

    Returns:
        By attribute, and for `ALL` of them, how much of each caption is right and how much it asks for.
    """
    reader = load_judge(weights_folder() / JUDGE)
    seen = [scene for chunk in torch.split(images, 64) for scene in reader.read(chunk.float() / 255)]
    found = [judge(asked, got) for asked, got in zip(scenes, seen, strict=True)]
    table = {name: ([one.right[name] for one in found], [one.asked[name] for one in found]) for name in ATTRIBUTES}
    return {**table, ALL: ([int(one.all_right) for one in found], [1] * len(found))}


def _kept(files: Sequence[Path], name: str, terms: tuple[str, ...], take: Callable[[], Any]) -> Any:
    """Read back what was taken of the same images under the same terms, or take it and keep it beside them."""
    checksum = 0
    for file in files:
        checksum = zlib.crc32(file.read_bytes(), checksum)
    asked = [*terms, checksum]
    cache = files[0].parent / name
    stored = read_json(cache) if cache.exists() else {}
    if stored.get("terms") != asked or "found" not in stored:
        stored = {"terms": asked, "found": take()}
        save_json(stored, cache)
    return stored["found"]
