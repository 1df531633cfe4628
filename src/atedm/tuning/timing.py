"""Time the steps that plans are made of, on the device of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median

from atedm.method.matched import Matched
from atedm.plans.plan import Cache, Plan
from atedm.tuning.costs import Arithmetic, Times
from atedm.tuning.drawing import Easel, Told

RATES = (0.1, 0.4, 0.7, 0.95)
"""At which pruned steps are timed."""
STEPS = 6
"""Of a run in which they are timed, the first of which warms up."""


def images_timed(branches: Sequence[int | None], dense_steps: int) -> float:
    """Return what `time_steps` takes at most, in dense images."""
    return (2 + len(RATES) + len(branches)) * STEPS / dense_steps


def time_steps(
    easel: Easel, arithmetic: Arithmetic, branches: Sequence[int | None], told: Told = lambda: None
) -> Times:
    """Run a few steps of each kind, and take medians."""
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
        method = Matched(rate=rate)
        pruned.append((arithmetic.step(method), step(dataclasses.replace(short, method=method), every)[0]))
    cached = {
        branch: step(dataclasses.replace(short, cache=Cache(1, 1.0, branch)), every)[0]
        for branch in branches
        if branch is not None  # a forecast takes next to nothing
    }
    return Times(arithmetic, outside, dense, cached, tuple(sorted(pruned)))
