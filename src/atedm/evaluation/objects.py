"""Does a ranking find the objects, and do the kept tokens stand for the others? Measured in dense runs.

What a ranking should do is nowhere said in one number, so there are three. Whether it puts tokens of objects before
tokens of background (AUC: 1 always, 0.5 as often as not, 0 never); how alike a dropped token is to the kept token most
like it, which bounds what any copy can do; and how alike it is to the kept token that the attention map says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from atedm.config import PruningConfig
from atedm.evaluation.dense_runs import FirstLayer, dense_blocks, draw_watched, kept_of
from atedm.generate import Progress
from atedm.matching import attention_source, match_by_features
from atedm.pruning import gather_tokens, keep_most_important
from atedm.tiny.scenes import BACKGROUNDS, COLOURS, Scene
from atedm.token_ranking import rank_tokens

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
    pruning_rate: float

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
    """Which pixels of a picture of ``scene`` are object: those nearer to an object's colour than to the background's.

    Args:
        image: (3, H, W) in [0, 1].
        scene: What is drawn.

    Returns:
        (H, W) bool.
    """
    objects = _shades([COLOURS[colour] for colour, _ in scene.objects], _LIT)
    background = _shades([BACKGROUNDS[scene.background]], _SHADED)
    pixels = image.float().flatten(1).mT
    nearest = torch.cdist(pixels, torch.cat([objects, background])).argmin(-1)
    return (nearest < len(objects)).reshape(image.shape[1:])


def _shades(colours: Sequence[tuple[int, int, int]], factors: Sequence[float]) -> Tensor:
    return torch.tensor([[min(c * factor / 255, 1.0) for c in colour] for colour in colours for factor in factors])


def area_under_curve(importance: Tensor, is_object: Tensor) -> float:
    """Chance that a token of an object is more important than one of the background; ties count half.

    Args:
        importance: (N,).
        is_object: (N,) bool, of which some are true and some are not.

    Raises:
        ValueError: If all tokens are of one kind.
    """
    if is_object.all() or not is_object.any():
        raise ValueError("all tokens are of one kind, so none ranks above the other")
    ours, theirs = importance[is_object].unsqueeze(1), importance[~is_object].unsqueeze(0)
    return float(((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean())


class _Seen(NamedTuple):
    """One ranking of one block in one call of the U-Net."""

    size: tuple[int, int]
    importance: Tensor
    best_match: float
    attention_match: float


def find_objects(
    pipe: Any,
    scenes: Sequence[Scene],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    rankings: Sequence[str] = RANKINGS,
    pruning_rate: float = PruningConfig().pruning_rate,
    seed: int = 0,
    batch: int = 10,
    progress: Progress | None = None,
) -> ObjectsReport:
    """Draw scenes dense, rank the tokens of every block in every step on the way, and hold the ranks against the image.

    Image i has the noise of seed ``seed + i``. With guidance the half of the batch that knows the prompt is looked at.

    Args:
        pipe: A pipeline that draws scenes, not patched and not compiled.
        scenes: What to draw.
        steps: Denoising steps, each one call of the U-Net.
        guidance: Guidance scale.
        rankings: Of `atedm.choices.RANKINGS`.
        pruning_rate: Share of the tokens taken for dropped, for the two measures of likeness.
        seed: Of the first image.
        batch: Images drawn at once.
        progress: Told of every call of the U-Net.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled, there is nothing to draw or nothing dropped, or a ranking is unknown.
    """
    if not scenes:
        raise ValueError("there are no scenes to draw")
    blocks = dense_blocks(pipe)
    configs = {name: PruningConfig(pruning_rate, ranking=name, map_mode="full") for name in rankings}
    values: defaultdict[tuple[str, int, str], list[tuple[float, float, float]]] = defaultdict(list)
    seen: dict[tuple[str, int, str], _Seen] = {}

    def rank(layer: FirstLayer) -> None:
        seen.update(((name, layer.step, layer.block), _rank(layer, config)) for name, config in configs.items())

    drawn = draw_watched(
        pipe,
        blocks,
        [scene.caption for scene in scenes],
        rank,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
        output_type="pt",
        progress=progress,
    )
    for start, images in drawn:
        group = scenes[start : start + batch]
        masks = torch.stack([object_mask(image.cpu(), scene) for image, scene in zip(images, group, strict=True)])
        for where, one in seen.items():
            is_object = functional.adaptive_avg_pool2d(masks.float(), one.size).flatten(1) > 0.5
            for importance, mask in zip(one.importance, is_object, strict=True):
                if mask.any() and not mask.all():
                    found = (area_under_curve(importance, mask), one.best_match, one.attention_match)
                    values[where].append(found)
        seen.clear()
    findings = tuple(
        Finding(ranking, step, block, blocks[block][0].level, *(float(mean) for mean in torch.tensor(found).mean(0)))
        for (ranking, step, block), found in values.items()
    )
    return ObjectsReport(findings, len(scenes), steps, pruning_rate)


def _rank(layer: FirstLayer, config: PruningConfig) -> _Seen:
    """Rank the tokens of one layer, and see whom its dropped tokens would be refilled from."""
    tokens = layer.tokens
    count = kept_of(layer, config.pruning_rate)
    ranking = rank_tokens(
        config,
        tokens,
        lambda: layer.self_attention,
        lambda: layer.cross_attention,
        step=layer.step,
        size=layer.size,
        count=count,
    )
    assert ranking.attention_map is not None  # every config here copies by attention, and by all of it
    keep = keep_most_important(ranking.importance, count)
    is_dropped = torch.ones_like(ranking.importance).scatter(1, keep, 0.0)

    def likeness(source: Tensor) -> float:
        copied = gather_tokens(gather_tokens(tokens, keep), source)
        cosine = functional.cosine_similarity(tokens, copied, dim=-1)
        return float((cosine * is_dropped).sum() / is_dropped.sum())

    return _Seen(
        layer.size,
        ranking.importance.cpu(),
        likeness(match_by_features(tokens, keep, "cosine").source),
        likeness(attention_source(ranking.attention_map, keep)),
    )
