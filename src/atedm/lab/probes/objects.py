"""Does a ranking find the objects, and do the kept tokens represent the others? Measured in dense runs.

Three figures: whether a ranking puts tokens of objects before tokens of background (AUC: 1 always, 0.5 as often as not,
0 never); how alike a dropped token is to the kept token most like it, which bounds what any copy can do; and how alike
it is to the kept token that the attention map names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from atedm.lab.ablation import Variant
from atedm.lab.ablation.choosing import rank_tokens
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import dense_unet, draw_dense, first_layers_watched
from atedm.lab.progress import Progress, silent
from atedm.method.contract import View
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.matching import match_by_features
from atedm.tiny.scenes import BACKGROUNDS, COLOURS, Scene

RANKINGS = (
    "self-attention",
    "attention-received",
    "cross-attention-entropy",
    "cross-attention-power",
    "cross-attention-soft-clip",
    "cross-attention-hard-clip",
    "uniform-random",
    "cells",
    "lattice",
    "facility-location",
    "representative",
)
# How far light, texture and shadow take a colour: see `atedm.tiny.scenes.render`.
_LIT = (0.8, 1.0, 1.2)
_SHADED = (1.0, 0.86, 0.72, 0.6, 0.5)


@dataclass(frozen=True)
class Finding:
    """One ranking in one block and one step, averaged over images."""

    ranking: str
    step: int
    block: str
    level: int
    #: Chance that a token of an object ranks above one of the background, ties counting half.
    auc: float
    #: Mean cosine of a dropped token's features to those of the kept token most like it.
    best_match: float
    #: The same to the kept token from which the paper's rule copies.
    attention_match: float


@dataclass(frozen=True)
class ObjectsReport:
    """All findings of some images."""

    findings: tuple[Finding, ...]
    images: int
    steps: int
    rate: float

    def mean(self, what: str, *, ranking: str, level: int | None = None, step: int | None = None) -> float:
        """Mean of a field of `Finding` over the blocks and steps that are not given."""
        values = [
            float(getattr(found, what))
            for found in self.findings
            if found.ranking == ranking and level in (None, found.level) and step in (None, found.step)
        ]
        return sum(values) / len(values)

    @property
    def levels(self) -> list[int]:
        """Feature levels that have attention blocks."""
        return sorted({found.level for found in self.findings})

    @property
    def rankings(self) -> list[str]:
        """In the order they were asked for."""
        return list(dict.fromkeys(found.ranking for found in self.findings))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def object_mask(image: Tensor, scene: Scene) -> Tensor:
    """Say which pixels of an image (3, H, W) in [0, 1] are nearer to an object's colour than to the background's.

    Returns:
        (H, W) bool.
    """
    objects = _shades([COLOURS[colour] for colour, _ in scene.objects], _LIT)
    background = _shades([BACKGROUNDS[scene.background]], _SHADED)
    nearest = torch.cdist(image.float().flatten(1).mT, torch.cat([objects, background])).argmin(-1)
    return (nearest < len(objects)).reshape(image.shape[1:])


def _shades(colours: Sequence[tuple[int, int, int]], factors: Sequence[float]) -> Tensor:
    return torch.tensor([[min(c * factor / 255, 1.0) for c in colour] for colour in colours for factor in factors])


def area_under_curve(importance: Tensor, is_object: Tensor) -> float:
    """Chance that a token of an object is more important than one of the background; ties count half.

    ``importance`` is (N,), ``is_object`` (N,) bool.

    Raises:
        ValueError: If all tokens are of one kind.
    """
    if is_object.all() or not is_object.any():
        raise ValueError("all tokens are of one kind, so none ranks above the other")
    ours, theirs = importance[is_object].unsqueeze(1), importance[~is_object].unsqueeze(0)
    return float(((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean())


class _Ranked(NamedTuple):
    """One ranking of one block in one call of the U-Net."""

    size: tuple[int, int]
    importance: Tensor
    best_match: float
    attention_match: float


def find_objects(
    pipe: Any,
    scenes: Sequence[Scene],
    drawing: Drawing,
    *,
    rankings: Sequence[str] = RANKINGS,
    rate: float = 0.63,
    progress: Progress = silent,
) -> ObjectsReport:
    """Draw scenes dense, rank the tokens of every block in every step, and compare the ranks with the image.

    ``pipe`` draws scenes; with guidance the half of the batch that knows the prompt is looked at. ``rankings`` are some
    of `RANKINGS`; ``rate`` is the share of the tokens taken for dropped, for the two measures of likeness.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled, there is nothing to draw or nothing dropped, or a ranking is unknown.
    """
    _, spans = dense_unet(pipe)
    variants = {name: Variant(rank=name, map_mode="full") for name in rankings}
    values: defaultdict[tuple[str, int, str], list[tuple[float, float, float]]] = defaultdict(list)
    seen: dict[tuple[str, int, str], _Ranked] = {}

    def rank(view: View) -> None:
        seen.update(((name, int(view.step), view.place.name), _rank(view, each)) for name, each in variants.items())

    captions = [scene.caption for scene in scenes]
    watch = partial(first_layers_watched, spans, rank, rate)
    for start, images in draw_dense(pipe, captions, drawing, watch, output_type="pt", progress=progress):
        group = scenes[start : start + drawing.batch]
        masks = torch.stack([object_mask(image.cpu(), scene) for image, scene in zip(images, group, strict=True)])
        for key, ranked in seen.items():
            is_object = functional.adaptive_avg_pool2d(masks.float(), ranked.size).flatten(1) > 0.5
            for importance, mask in zip(ranked.importance, is_object, strict=True):
                if mask.any() and not mask.all():
                    auc = area_under_curve(importance, mask)
                    values[key].append((auc, ranked.best_match, ranked.attention_match))
        seen.clear()
    findings = tuple(
        Finding(ranking, step, block, spans[block][0].level, *torch.tensor(found).mean(0).tolist())
        for (ranking, step, block), found in values.items()
    )
    return ObjectsReport(findings, len(scenes), drawing.steps, rate)


def _rank(view: View, variant: Variant) -> _Ranked:
    """Rank the tokens of one layer, and see how alike its dropped ones are to what they would be refilled from."""
    tokens = view.tokens
    ranking = rank_tokens(variant, view)
    assert ranking.source is not None  # every variant here copies by attention
    keep = keep_most_important(ranking.importance, view.count)
    is_dropped = torch.ones_like(ranking.importance).scatter(1, keep, 0.0)

    def likeness(source: Tensor) -> float:
        copied = gather_tokens(gather_tokens(tokens, keep), source)
        cosine = functional.cosine_similarity(tokens, copied, dim=-1)
        return float((cosine * is_dropped).sum() / is_dropped.sum())

    most_alike = match_by_features(functional.normalize(tokens, dim=-1), keep).source
    return _Ranked(view.size, ranking.importance.cpu(), likeness(most_alike), likeness(ranking.source(keep)))
