"""What a run by a plan costs, as a share of the dense run: by arithmetic, or by times measured on this device."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from atedm.costs.architectures import Architecture
from atedm.costs.budget import CostOutOfReach, Profile, profile_of
from atedm.costs.counting import count_macs
from atedm.costs.spans import span_macs
from atedm.method.contract import Method
from atedm.plans.caching import deep_cached
from atedm.plans.plan import Plan

HIGHEST_RATE = 0.99
"""That a search goes up to."""
_HALVINGS = 20
"""Of the range of rates: six digits and more."""


class RunCosts(Protocol):
    """Prices runs of one model at one size."""

    @property
    def of(self) -> str:
        """What is counted, "arithmetic" or "time"."""
        ...

    def share(self, plan: Plan, dense_steps: int) -> float:
        """Return what a run by ``plan`` costs of a dense run of ``dense_steps``."""
        ...


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-accumulates of the U-Net, everything counted."""

    profile: Profile
    #: By branch: what a step by DeepCache takes outside of spans, and the names of the spans that still run in it.
    cached: dict[int, tuple[int, frozenset[str]]]
    of: str = "arithmetic"

    @classmethod
    def counted(cls, arch: Architecture, size: tuple[int, int] | None, branches: Sequence[int | None]) -> Arithmetic:
        """Count the U-Net, and a step by DeepCache for each branch, on the meta device."""
        return cls(profile_of(arch, size), {one: _cached_step(arch, size, one) for one in branches if one is not None})

    def share(self, plan: Plan, dense_steps: int) -> float:
        """Sum up the steps of the run, each by what runs in it."""
        full, total = set(plan.full_steps()), 0
        kinds = Counter(
            (step in full, plan.method is not None and plan.method.is_early(step / plan.steps))
            for step in range(plan.steps)
        )
        for (is_full, early), count in kinds.items():
            rest: int = self.profile.rest
            names: frozenset[str] | None = None
            if not is_full:
                assert plan.cache is not None
                branch = plan.cache.branch
                rest, names = (0, frozenset()) if branch is None else self.cached[branch]
            total += count * (rest + _spans(self.profile, plan.method, early, names))
        return total / (dense_steps * self.profile.dense())

    def step(self, method: Method) -> float:
        """Return what a step pruned by ``method`` takes of a dense one, where it is not early."""
        return (self.profile.rest + _spans(self.profile, method, False)) / self.profile.dense()


def _spans(profile: Profile, method: Method | None, early: bool, names: frozenset[str] | None = None) -> int:
    shapes = [shape for shape in profile.shapes if names is None or shape.place.name in names]
    return sum(span_macs(shape, method, early=early).exact for shape in shapes)


def _cached_step(arch: Architecture, size: tuple[int, int] | None, branch: int) -> tuple[int, frozenset[str]]:
    """Count the second of two steps, of which the first runs the whole U-Net."""
    unet, call = arch.on_meta(), arch.call(size)
    timesteps = torch.tensor([999, 499])
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=timesteps))
    with deep_cached(pipe, lambda steps: (0,), branch):
        count_macs(unet, call, timesteps[0])  # type: ignore[arg-type]  # it looks like a step of a run
        counted = count_macs(unet, call, timesteps[1])  # type: ignore[arg-type]
    return counted.rest, frozenset(name for name, macs in counted.spans.items() if macs)


@dataclass(frozen=True)
class Times:
    """Seconds on this device, measured step by step. A pruned step takes what steps of equal arithmetic take."""

    arithmetic: Arithmetic
    #: Of an image outside of the U-Net: text, latents to pixels, the scheduler.
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
        full, step = len(plan.full_steps()), self.dense
        if plan.method is not None:
            step = float(np.interp(self.arithmetic.step(plan.method), *np.array(self.pruned).T))
        branch = None if plan.cache is None else plan.cache.branch
        cached = 0.0 if branch is None else self.cached[branch]
        image = self.outside + full * step + (plan.steps - full) * cached
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


def keeps(plan: Plan, costs: RunCosts, budget: float, dense_steps: int) -> bool:
    """Whether a run by a plan costs ``budget`` or less without pruning, or at the highest rate of its method."""
    ends = (0.0, HIGHEST_RATE) if plan.method is not None else (0.0,)
    return any(costs.share(_at(plan, rate), dense_steps) <= budget for rate in ends)


def _at(plan: Plan, rate: float) -> Plan:
    method = None if rate == 0 else dataclasses.replace(plan.method, rate=rate)  # type: ignore[type-var]
    return dataclasses.replace(plan, method=method)


def fit_rate(plan: Plan, costs: RunCosts, budget: float, dense_steps: int) -> Plan:
    """Return ``plan`` with the least rate of its method at which a run costs ``budget`` or less.

    Where the budget is kept without pruning, the plan is returned without a method.

    Raises:
        CostOutOfReach: If no rate up to `HIGHEST_RATE` keeps to the budget.
    """

    def fits(rate: float) -> bool:
        return costs.share(_at(plan, rate), dense_steps) <= budget

    if fits(0.0):
        return _at(plan, 0.0)
    if plan.method is None or not fits(HIGHEST_RATE):
        raise CostOutOfReach(f"{plan.what()} costs more than {budget:.3f} at any rate")
    low, high = 0.0, HIGHEST_RATE
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _at(plan, math.ceil(high * 1e6) / 1e6)


def most_steps(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number of steps from 0 to ``most`` that ``fits``, which all smaller ones do too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
