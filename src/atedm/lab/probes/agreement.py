"""How far a mode of the attention map agrees with the whole map, measured in dense runs on equal queries and keys."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atedm.lab.ablation import Variant
from atedm.lab.ablation.choosing import Ranking, rank_tokens
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import look_into_dense
from atedm.lab.progress import Progress, silent
from atedm.method.contract import View
from atedm.method.keep import keep_most_important


@dataclass(frozen=True)
class Agreement:
    """One mode at one feature level, averaged over blocks, steps and images. All are shares in [0, 1]."""

    mode: str
    level: int
    #: Of the tokens that the whole map keeps, those that the mode keeps too. By chance it is the share kept.
    kept: float
    importance: float  #: Importance by the whole map of what the mode keeps, of the most that it could keep.
    source: float  #: Of the tokens that the whole map drops, those that copy the same kept token.


def map_agreement(
    pipe: Any,
    prompts: Sequence[str],
    modes: Mapping[str, Variant],
    drawing: Drawing,
    *,
    rate: float = 0.63,
    progress: Progress = silent,
) -> list[Agreement]:
    """Draw dense, and compare what each mode would keep and copy with what the whole map says.

    ``modes`` are variants by name that differ from the default in ``map_mode`` and ``sampled_rows`` only. With guidance
    the half of the batch that knows the prompt is looked at. ``rate`` is the share of the tokens that is dropped.
    Raises as `look_into_dense`.
    """
    values: defaultdict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)

    def compare(view: View) -> None:
        whole = rank_tokens(Variant(map_mode="full"), view)
        for name, variant in modes.items():
            values[name, view.place.level] += compared(whole, rank_tokens(variant, view), view.count)

    for _ in look_into_dense(pipe, prompts, drawing, compare, rate, progress=progress):
        pass  # `compare` keeps what is wanted
    order = [*modes]
    ranked = sorted(values.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    return [Agreement(mode, level, *torch.tensor(found).mean(0).tolist()) for (mode, level), found in ranked]


def variant_of_mode(name: str) -> Variant:
    """Read a map mode, with the number of rows of a sample, such as "sampled/64", or raise a `ValueError`."""
    mode, slash, rows = name.partition("/")
    if slash and (mode != "sampled" or not rows.isdecimal()):
        raise ValueError(f"only a sample has a number of rows, and that after a slash: sampled/64, not {name!r}")
    return Variant(map_mode=mode, sampled_rows=int(rows)) if rows else Variant(map_mode=mode)


def compared(whole: Ranking, ours: Ranking, count: int) -> list[tuple[float, float, float]]:
    """Return (kept, importance, source) of `Agreement` for every image, where ``count`` tokens are kept."""
    keep, our_keep = (keep_most_important(ranking.importance, count) for ranking in (whole, ours))
    is_kept = torch.zeros_like(whole.importance).scatter(1, keep, 1.0)
    importance = whole.importance.gather(1, our_keep).sum(1) / whole.importance.gather(1, keep).sum(1)
    assert whole.source is not None
    assert ours.source is not None
    same = (whole.source(keep) == ours.source(keep)).float() * (1 - is_kept)
    columns = (is_kept.gather(1, our_keep).mean(1), importance, same.sum(1) / (1 - is_kept).sum(1))
    return [*zip(*(column.tolist() for column in columns), strict=True)]
