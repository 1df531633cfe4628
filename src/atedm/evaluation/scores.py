"""From folders of images to figures with intervals: distance to dense, LPIPS, caption accuracy, CLIP score, FID."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atedm.evaluation.captions import columns, judge_images, psnr_each
from atedm.evaluation.images import image_file
from atedm.evaluation.pixels import read_pixels
from atedm.evaluation.prompts import Prompt
from atedm.evaluation.statistics import Interval, mean_interval, ratio_interval
from atedm.files import read_json, save_json
from atedm.pipelines import tiny_folder
from atedm.tiny.classifier import load_classifier
from atedm.tiny.scenes import CANVAS

CLIP, FID, ACCURACY, DISTANCE, LPIPS = METRICS = ("clip", "fid", "accuracy", "distance", "lpips")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Metrics:
    """Which figures are taken, and by which models."""

    names: tuple[str, ...] = METRICS[:4]
    #: An open_clip model, "local-dir:..." or a name.
    clip_model: str = "ViT-g-14"
    clip_pretrained: str = "laion2b_s34b_b88k"
    #: Features that FID compares: "inception", or an open_clip model, with the same weights.
    fid_features: str = "inception"
    #: Network of LPIPS.
    lpips_net: str = "alex"


@dataclass(frozen=True)
class Scores:
    """Figures of one method."""

    #: Per image; a list is empty where the metric was not taken.
    psnr: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    clip: list[float] = field(default_factory=list)
    #: (right, asked) per image, for each attribute and "all".
    accuracy: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    fid: Interval | None = None

    def intervals(self) -> dict[str, Interval]:
        """Sum up, with 95 % intervals by bootstrap over images."""
        found: dict[str, Interval] = {}
        if self.psnr:
            found["psnr"] = mean_interval(self.psnr)
        if self.lpips:
            found["lpips"] = mean_interval(self.lpips)
        if "all" in self.accuracy:
            found["accuracy"] = ratio_interval(*self.accuracy["all"])
        if self.clip:
            found["clip"] = mean_interval(self.clip)
        if self.fid is not None:
            found["fid"] = self.fid
        return found

    def difference(self, other: Scores) -> dict[str, Interval]:
        """Paired differences to another method on the same prompts and noise: this minus the other."""
        pairs = {"psnr": (self.psnr, other.psnr), "lpips": (self.lpips, other.lpips), "clip": (self.clip, other.clip)}
        if "all" in self.accuracy and "all" in other.accuracy:
            pairs["accuracy"] = ([*map(float, self.accuracy["all"][0])], [*map(float, other.accuracy["all"][0])])
        return {
            name: mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
            for name, (ours, theirs) in pairs.items()
            if ours and theirs
        }


def score(
    folder: Path,
    prompts: Sequence[Prompt],
    metrics: Metrics,
    *,
    dense: Path | None = None,
    references: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Scores:
    """Score the images of one method. What was scored before under the same terms is read back.

    Args:
        folder: Where images 0 to N-1 are.
        prompts: N of them.
        metrics: Which figures, by which models.
        dense: Folder of the dense images; None for dense itself.
        references: Folder of real pictures, for FID.
        device: Where CLIP and FID are computed.
        progress: Told what is being scored.

    Raises:
        ValueError: If an image is missing or cannot be read, or the weights of a metric cannot be had.
    """
    files = [image_file(folder, index) for index in range(len(prompts))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} images, such as {missing[0]}")

    def tell(what: str) -> None:
        if progress is not None:
            progress(what)

    psnr: list[float] = []
    if DISTANCE in metrics.names and dense is not None:
        tell("distance to dense")
        psnr = distances(files, [image_file(dense, index) for index in range(len(prompts))])
    lpips: list[float] = []
    if LPIPS in metrics.names and dense is not None:
        from atedm.evaluation.perceptual import lpips_distances

        tell("LPIPS")
        theirs = [image_file(dense, index) for index in range(len(prompts))]
        lpips = lpips_distances(files, theirs, net=metrics.lpips_net, device=device)
    accuracy: dict[str, tuple[list[int], list[int]]] = {}
    if ACCURACY in metrics.names and all(prompt.scene is not None for prompt in prompts):
        tell("caption accuracy")
        judge = load_classifier(tiny_folder() / "classifier.safetensors")
        scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
        pictures = torch.stack([read_pixels(file, CANVAS) for file in files])
        accuracy = columns(judge_images(judge, scenes, pictures))
    clip: list[float] = []
    if CLIP in metrics.names:
        tell("CLIP score")
        clip = _clip(files, prompts, metrics, folder, device)
    fid = None
    if FID in metrics.names and references is not None:
        tell("FID")
        fid = _fid(folder, references, len(prompts), metrics, device)
    return Scores(psnr, lpips, clip, accuracy, fid)


def check_metrics(metrics: Metrics, device: str, *, has_references: bool = True) -> None:
    """Open every model that the metrics need and let go of it: what is missing is told before anything is drawn.

    Args:
        metrics: Which figures, by which models.
        device: Where to open them.
        has_references: Whether there are real pictures, without which FID is not taken.

    Raises:
        ImportError: If a package is missing.
        ValueError: If weights cannot be had.
    """
    if CLIP in metrics.names:
        from atedm.evaluation.clip_score import open_clip_model

        open_clip_model(metrics.clip_model, metrics.clip_pretrained, device)
    if FID in metrics.names and has_references:
        from atedm.evaluation.fid import check_features

        check_features(metrics.fid_features, metrics.clip_pretrained, device=device)
    if LPIPS in metrics.names:
        from atedm.evaluation.perceptual import lpips_model

        lpips_model(metrics.lpips_net, device)


def distances(files: Sequence[Path], references: Sequence[Path]) -> list[float]:
    """PSNR in dB of each picture to its reference, capped at 99 where they are equal.

    Raises:
        ValueError: If one cannot be read, or two differ in size.
    """
    found = []
    for file, reference in zip(files, references, strict=True):
        ours, theirs = read_pixels(file), read_pixels(reference)
        if ours.shape != theirs.shape:
            sizes = [f"{pixels.shape[2]} x {pixels.shape[1]}" for pixels in (ours, theirs)]
            raise ValueError(f"{file} has {sizes[0]} pixels, {reference} has {sizes[1]}; remove the one that is wrong")
        found += psnr_each(ours.unsqueeze(0), theirs.unsqueeze(0))
    return found


def _clip(files: Sequence[Path], prompts: Sequence[Prompt], metrics: Metrics, folder: Path, device: str) -> list[float]:
    from atedm.evaluation.clip_score import clip_scores

    texts = [prompt.text for prompt in prompts]
    terms = {"model": metrics.clip_model, "pretrained": metrics.clip_pretrained, "files": _checksums(files)}
    cache = folder / "clip.json"
    stored = read_json(cache) if cache.exists() else {}
    if stored.get("terms") == terms:
        return list(stored["scores"])
    scores = clip_scores(files, texts, model=metrics.clip_model, pretrained=metrics.clip_pretrained, device=device)
    save_json({"terms": terms, "scores": scores}, cache)
    return scores


def _fid(folder: Path, references: Path, count: int, metrics: Metrics, device: str) -> Interval:
    from atedm.evaluation.fid import fid_interval

    ours, theirs = (_features(where, count, metrics, device) for where in (folder, references))
    return fid_interval(ours, theirs)


def _features(folder: Path, count: int, metrics: Metrics, device: str) -> Any:
    from atedm.evaluation.fid import file_features

    files = [image_file(folder, index) for index in range(count)]
    extractor, pretrained = metrics.fid_features, metrics.clip_pretrained
    terms = {"extractor": extractor, "pretrained": pretrained, "files": _checksums(files)}
    cache = folder / "features.json"
    stored = read_json(cache) if cache.exists() else {}
    if stored.get("terms") == terms:
        return np.asarray(stored["features"])
    features = file_features(files, extractor, pretrained=pretrained, device=device)
    save_json({"terms": terms, "features": features.tolist()}, cache)
    return features


def _checksums(files: Sequence[Path]) -> int:
    total = 0
    for file in files:
        total = zlib.crc32(file.read_bytes(), total)
    return total
