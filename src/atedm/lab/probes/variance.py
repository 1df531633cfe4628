"""How much attention maps tell tokens apart: their variance, step by step (main paper, Fig. 5; supplement C.4).

A map whose entries are all alike ranks no token above another. The paper finds the variance above 1e-5 after the first
15 of 50 denoising steps, and for that reason prunes less in those 15. Measured here on any dense pipeline.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import look_into_dense
from atedm.lab.progress import Progress, silent
from atedm.lab.tables import markdown_table
from atedm.method.attention_map import attention_maps, empty_map
from atedm.method.contract import View

THRESHOLD = 1e-5
"""The variance that the paper finds exceeded after its early steps (supplement C.4)."""
EARLY_SHARE = 0.3
"""Those steps as a share of the run: 15 of 50."""
_ROWS = 11


@dataclass(frozen=True)
class BlockVariance:
    """Variance of the entries of one block's first attention map in one denoising step, averaged over the images."""

    step: int  #: Counted from 0.
    block: str
    level: int  #: Feature level, counted from 1, the finest.
    tokens: int  #: N; the map is N x N.
    per_head: float  #: Of each head's map, averaged over heads and batch.
    head_mean: float  #: Of the head-mean map, averaged over the batch.

    @property
    def relative_per_head(self) -> float:
        """``N^2 per_head``: entries average 1 / N, so this compares blocks of different sizes."""
        return self.tokens**2 * self.per_head


@dataclass(frozen=True)
class VarianceReport:
    """The variance of every block in every step."""

    rows: tuple[BlockVariance, ...]
    images: int
    steps: int

    def mean_by_step(self, field: str = "per_head", level: int | None = None) -> list[float]:
        """Return the mean of a number of `BlockVariance` over the blocks of one level or of all, one a step."""
        rows = [row for row in self.rows if level in (None, row.level)]
        values = [[float(getattr(row, field)) for row in rows if row.step == step] for step in range(self.steps)]
        return [sum(of_step) / len(of_step) for of_step in values]

    def mean_by_level(self) -> dict[int, list[float]]:
        """Return `mean_by_step` of each feature level; levels ascend."""
        return {level: self.mean_by_step(level=level) for level in sorted({row.level for row in self.rows})}

    def first_step_above(self, threshold: float = THRESHOLD) -> int | None:
        """Return the first step whose mean over the blocks exceeds ``threshold``, counted from 0; None if none does."""
        return next((step for step, mean in enumerate(self.mean_by_step()) if mean > threshold), None)

    def as_dict(self, threshold: float = THRESHOLD) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            **asdict(self),
            "threshold": threshold,
            "first_step_above": self.first_step_above(threshold),
            "mean_by_step": self.mean_by_step(),
            "relative_mean_by_step": self.mean_by_step("relative_per_head"),
            "mean_by_level": {str(level): means for level, means in self.mean_by_level().items()},
        }

    def table(self, threshold: float) -> str:
        """Show some of the steps, the first and the last among them, and where the threshold is first exceeded."""
        shown = sorted({round(i * (self.steps - 1) / (_ROWS - 1)) for i in range(_ROWS)})
        columns = {"mean": self.mean_by_step(), "relative": self.mean_by_step("relative_per_head")}
        columns |= {f"level {level}": values for level, values in self.mean_by_level().items()}
        rows = [[step, *(f"{values[step]:.2g}" for values in columns.values())] for step in shown]
        first = self.first_step_above(threshold)
        said = f"the mean is never above {threshold:g}"
        if first is not None:
            before = f"{first} of {self.steps} steps come before it, {first / self.steps:.0%} of the run"
            said = f"the mean is first above {threshold:g} in step {first}: {before}"
        return f"{markdown_table(['step', *columns], rows)}\n\n{said} (in the paper 30%, 15 of 50)"


def map_variance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Variance of the entries of an attention map, around their own mean, in two ways.

    ``q`` and ``k`` are (B, H, N, D) of any floating dtype, ``scale`` the factor on the logits. Gives (2,) float32: of
    each head's map, averaged over heads and batch; and of the head-mean map, averaged over the batch. Never more than
    one head's map and the mean are held.
    """
    heads = q.shape[1]

    def entry_variance(maps: Tensor) -> Tensor:
        # Not mean(a^2) - mean(a)^2: 1e-9 between two numbers of about 1e-7 is lost in float32.
        return maps.flatten(1).var(-1, unbiased=False).mean()

    mean_map = empty_map(q, k)
    per_head = mean_map.new_zeros(())
    for a in attention_maps(q, k, scale):
        per_head += entry_variance(a) / heads
        mean_map.add_(a, alpha=1 / heads)
        del a  # or it lives on while the next head is computed
    return torch.stack([per_head, entry_variance(mean_map)])


def attention_variance(
    pipe: Any, prompts: Sequence[str], drawing: Drawing, *, progress: Progress = silent
) -> VarianceReport:
    """Draw one image a prompt, dense, and measure the first attention map of every block on the way.

    The images are what they would be without measuring, are drawn one at a time, and are not decoded. With guidance the
    unprompted half of the batch counts like the prompted. Where the scheduler calls the U-Net more often than once a
    step (Heun), calls are spread over the steps in their order and averaged within each. Raises as
    `look_into_dense`.
    """

    def measure(view: View) -> tuple[int, tuple[str, int, int], list[float]]:
        block = (view.place.name, view.place.level, view.tokens.shape[1])
        return int(view.step), block, map_variance(*view.self_attention()).tolist()

    values: defaultdict[tuple[int, tuple[str, int, int]], list[list[float]]] = defaultdict(list)
    one = replace(drawing, batch=1)
    for _, found in look_into_dense(pipe, prompts, one, measure, None, both_halves=True, progress=progress):
        calls = 1 + found[-1][0]
        for call, block, variance in found:
            values[call * drawing.steps // calls, block].append(variance)
    rows = (BlockVariance(step, *block, *np.mean(of, axis=0).tolist()) for (step, block), of in values.items())
    return VarianceReport(tuple(rows), len(prompts), drawing.steps)
