"""What is compared, behind one interface: the model as it is, pruning by any method, and a plan."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from atedm.method.contract import Method
from atedm.patch import pruned
from atedm.plans.plan import Plan
from atedm.words import is_number

_LONGEST_CYCLE = 10
"""A choice of tokens that is kept for more steps than these counts as kept for the whole run."""


@dataclass(frozen=True)
class Candidate:
    """A way to make images cheaper, or none; its settings are its fields."""

    #: What charts call it. Candidates that differ in their cost alone have the same kind.
    kind = ""
    #: What files call it, where that is not the same.
    filed_as = ""
    #: Steps after which what it does repeats itself.
    cycle = 1

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Change a pipeline for the length of a ``with`` block; ``seed`` is for methods that draw at random."""
        return nullcontext()

    def steps_of(self, steps: int) -> int:
        """Denoising steps it takes where ``steps`` are asked for."""
        return steps

    def is_early(self, share: float) -> bool:
        """Whether it does less in a step before which ``share`` of the run is done."""
        return False

    def as_dict(self) -> dict[str, Any]:
        """Return everything that makes a difference as plain JSON values."""
        return {"kind": self.filed_as or self.kind, **asdict(self)}


@dataclass(frozen=True)
class Dense(Candidate):
    """The model as it is, or with fewer steps: what anyone can do without a method.

    Raises a `ValueError` if the share is out of its range.
    """

    steps_share: float = 1.0  #: Share of the denoising steps that are taken, in (0, 1].

    filed_as = "dense"

    def __post_init__(self) -> None:
        if not is_number(self.steps_share) or not 0 < self.steps_share <= 1:
            raise ValueError(f"steps_share must be above 0 and at most 1, not {self.steps_share!r}")

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Dense, or dense with fewer steps."""
        return "dense" if self.steps_share == 1 else "dense, fewer steps"

    def steps_of(self, steps: int) -> int:
        """Return the share of ``steps``, at least one."""
        return max(1, round(self.steps_share * steps))


@dataclass(frozen=True)
class Pruning(Candidate):
    """AT-EDM, matched pruning, or a variant of them."""

    method: Method

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The name of the method."""
        return self.method.name

    @property
    def cycle(self) -> int:  # type: ignore[override]
        """For how many steps a choice of tokens is kept."""
        kept_for: int = getattr(self.method, "refresh_every", 1)
        return kept_for if kept_for <= _LONGEST_CYCLE else 1

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Prune."""
        return pruned(pipe, self.method)

    def is_early(self, share: float) -> bool:
        """Ask the method."""
        return self.method.is_early(share)

    def as_dict(self) -> dict[str, Any]:
        """Return the method's settings."""
        return {"kind": "pruning", **self.method.as_dict()}


@dataclass(frozen=True)
class Planned(Candidate):
    """A plan that was found for the model, in as many steps of those asked for as it takes of its own dense steps."""

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
        settings = self.plan.moved().settings()
        if self.plan.fit_file is not None and self.plan.fit_file.is_file():  # by what is in it: it can be fitted anew
            settings["fit"] = hashlib.sha256(self.plan.fit_file.read_bytes()).hexdigest()[:16]
        return {"kind": "plan", **settings}
