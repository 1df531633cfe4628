"""Does a ranking find the objects, and do the kept tokens represent the others? Measured in dense runs.

Three figures: whether a ranking puts tokens of objects before tokens of background (AUC: 1 always, 0.5 as often as not,
0 never), where the judge says what is an object; how alike a dropped token is to the kept token most like it, which
bounds what any copy can do; and how alike it is to the kept token that the attention map names.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from atedm.lab.ablation import Variant
from atedm.lab.ablation.choosing import rank_tokens
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import look_into_dense
from atedm.lab.progress import Progress, silent
from atedm.lab.tables import markdown_table
from atedm.method.contract import View
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.matching import match_by_features
from atedm.tiny import weights_folder
from atedm.tiny.judge import JUDGE, load_judge
from atedm.tiny.scenes import Scene

RANKINGS = (
    *("self-attention", "attention-received"),
    *(f"cross-attention-{mapping}" for mapping in ("entropy", "power", "soft-clip", "hard-clip")),
    *("uniform-random", "cells", "lattice", "representative"),
)


@dataclass(frozen=True)
class Finding:
    """One ranking in one block and one step, averaged over images."""

    ranking: str
    step: int
    block: str
    level: int
    auc: float  #: Chance that a token of an object ranks above one of the background, ties counting half.
    best_match: float  #: Mean cosine of a dropped token's features to those of the kept token most like it.
    attention_match: float  #: The same to the kept token from which the paper's rule copies.


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

    def table(self) -> str:
        """Show a ranking a row, a figure of a level a column."""
        names = {"auc": "AUC", "best_match": "best match", "attention_match": "attention's match"}
        columns = [(what, level) for what in names for level in self.levels]
        rows = [
            [ranking, *(f"{self.mean(what, ranking=ranking, level=level):.3f}" for what, level in columns)]
            for ranking in self.rankings
        ]
        return markdown_table(["ranking", *(f"{names[what]}, level {level}" for what, level in columns)], rows)


def area_under_curve(importance: Tensor, is_object: Tensor) -> float:
    """Chance that a token of an object is more important than one of the background; ties count half.

    ``importance`` is (N,), ``is_object`` (N,) bool; nan if all tokens are of one kind.
    """
    ours, theirs = importance[is_object].unsqueeze(1), importance[~is_object].unsqueeze(0)
    return float(((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean())


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
    of `RANKINGS`; ``rate`` is the share of the tokens taken for dropped, for the two measures of likeness. Raises as
    `look_into_dense`, or a `ValueError` if a ranking is unknown.
    """
    judge = load_judge(weights_folder() / JUDGE)
    variants = {name: Variant(rank=name, map_mode="full") for name in rankings}
    values: defaultdict[tuple[str, int, str, int], list[tuple[float, float, float]]] = defaultdict(list)

    def rank(view: View) -> tuple[Any, ...]:
        where = (int(view.step), view.place.name, view.place.level)
        return view.size, where, {name: ranked(view, variant) for name, variant in variants.items()}

    captions = [scene.caption for scene in scenes]
    for images, seen in look_into_dense(pipe, captions, drawing, rank, rate, output_type="pt", progress=progress):
        maps = judge.object_maps(images).cpu()
        for size, where, by_ranking in seen:
            is_object = functional.interpolate(maps.unsqueeze(1), size, mode="area").flatten(1) > 0.5
            for name, (importance, best_match, attention_match) in by_ranking.items():
                for of_image, mask in zip(importance, is_object, strict=True):
                    if not math.isnan(auc := area_under_curve(of_image, mask)):
                        values[(name, *where)].append((auc, best_match, attention_match))
    findings = (Finding(*key, *torch.tensor(found).mean(0).tolist()) for key, found in values.items())
    return ObjectsReport(tuple(findings), len(scenes), drawing.steps, rate)


def ranked(view: View, variant: Variant) -> tuple[Tensor, float, float]:
    """Rank the tokens of one layer: their importance (B, N), and best_match and attention_match of `Finding`."""
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
    return ranking.importance.cpu(), likeness(most_alike), likeness(ranking.source(keep))
