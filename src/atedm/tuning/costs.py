"""What a run by a plan costs in arithmetic, as a share of the dense run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from atedm.costs.architectures import Architecture
from atedm.costs.budget import Profile, profile_of
from atedm.costs.counting import count_macs
from atedm.costs.spans import span_macs
from atedm.method.contract import Method
from atedm.plans.caching import deep_cached
from atedm.plans.plan import Plan


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-accumulates of the model, everything counted."""

    profile: Profile
    #: By branch: what a step by DeepCache takes outside of spans, and the names of the spans that still run in it.
    cached: dict[int, tuple[int, frozenset[str]]]
    of: str = "arithmetic"

    @classmethod
    def counted(cls, arch: Architecture, size: tuple[int, int] | None, branches: Sequence[int | None]) -> Arithmetic:
        """Count the model, and a step by DeepCache for each branch, on the meta device."""
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
