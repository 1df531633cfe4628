"""A plan that was found for the model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from atedm.lab.methods.candidates import Candidate
from atedm.patch import pruned
from atedm.plans.plan import Plan


@dataclass(frozen=True)
class Planned(Candidate):
    """A plan, compared in as many steps of those asked for as it takes of its own dense steps."""

    plan: Plan

    kind = "plan"

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Apply the plan."""
        return pruned(pipe, self.plan)

    def steps_of(self, steps: int) -> int:
        """Return the plan's steps where its own dense steps are asked for, or that share of ``steps``."""
        dense = int(self.plan.found.get("dense_steps", self.plan.steps))
        return self.plan.steps if steps == dense else max(1, round(steps * self.plan.steps / dense))

    def as_dict(self) -> dict[str, Any]:
        """Return what the plan does."""
        return {"kind": "plan", **self.plan.moved().settings()}
