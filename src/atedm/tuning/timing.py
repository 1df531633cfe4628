"""What a run by a plan takes on this device: the steps that plans are made of are timed, and added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from atedm.method.matched import Matched
from atedm.plans.plan import Cache, Plan
from atedm.tuning.costs import Arithmetic
from atedm.tuning.drawing import Easel, Told

RATES = (0.1, 0.4, 0.7, 0.95)
"""At which pruned steps are timed."""
STEPS = 6
"""Of a run in which they are timed, the first of which warms up."""


@dataclass(frozen=True)
class Times:
    """Seconds on this device, measured step by step. A pruned step takes what steps of equal arithmetic take."""

    arithmetic: Arithmetic
    #: Of an image outside of the model: text, latents to pixels, the scheduler.
    outside: float
    #: Of a dense step.
    dense: float
    #: Of a step by DeepCache, by branch.
    cached: dict[int, float]
    #: Of steps by matched pruning: their share of the dense arithmetic, ascending, and seconds.
    pruned: tuple[tuple[float, float], ...]
    of: str = "time"

    def share(self, plan: Plan, dense_steps: int) -> float:
        """Add up measured steps."""
        full, step, early = len(plan.full_steps()), self.dense, 0
        if plan.method is not None:
            step = float(np.interp(self.arithmetic.step(plan.method), *np.array(self.pruned).T))
            # Of the methods that are timed, an early step is a dense one.
            early = sum(plan.method.is_early(index / plan.steps) for index in plan.full_steps())
        branch = None if plan.cache is None else plan.cache.branch
        cached = 0.0 if branch is None else self.cached[branch]
        image = self.outside + early * self.dense + (full - early) * step + (plan.steps - full) * cached
        return image / (self.outside + dense_steps * self.dense)

    def as_dict(self) -> dict[str, Any]:
        """Return what was measured as plain JSON values."""
        cached = {str(branch): seconds for branch, seconds in self.cached.items()}
        return {"outside": self.outside, "dense": self.dense, "cached": cached, "pruned": self.pruned}

    @classmethod
    def from_dict(cls, arithmetic: Arithmetic, values: dict[str, Any]) -> Times:
        """Read back what `as_dict` gave."""
        cached = {int(branch): float(seconds) for branch, seconds in values["cached"].items()}
        pruned = tuple((float(share), float(seconds)) for share, seconds in values["pruned"])
        return cls(arithmetic, float(values["outside"]), float(values["dense"]), cached, pruned)


def images_timed(branches: Sequence[int | None], dense_steps: int) -> float:
    """Return what `time_steps` takes at most, in dense images."""
    return (2 + len(RATES) + len(branches)) * STEPS / dense_steps


def time_steps(
    easel: Easel,
    arithmetic: Arithmetic,
    branches: Sequence[int | None],
    matched: Matched | None = None,
    told: Told = lambda: None,
) -> Times:
    """Run a few steps of each kind, those of ``matched`` pruning among them, and take medians."""
    short = dataclasses.replace(easel.dense, steps=STEPS)

    def step(plan: Plan, which: Sequence[int]) -> tuple[float, float]:
        steps, outside = easel.step_seconds(plan)
        told()
        return median(steps[i] for i in which), outside

    step(short, [0])  # to warm up
    every = range(1, STEPS)
    dense, outside = step(short, every)
    pruned = []
    for rate in RATES:
        method = dataclasses.replace(matched or Matched(), rate=rate)
        pruned.append((arithmetic.step(method), step(dataclasses.replace(short, method=method), every)[0]))
    cached = {
        branch: step(dataclasses.replace(short, cache=Cache(1, 1.0, branch)), every)[0]
        for branch in branches
        if branch is not None  # a forecast takes next to nothing
    }
    return Times(arithmetic, outside, dense, cached, tuple(sorted(pruned)))
