"""The search: single techniques at the budget first, then what Optuna proposes, until the images are spent.

Everything that is measured is kept on disk, and everything else follows from it and from the seed. So a search that was
killed is run again from its start, finds what it had measured, and goes on to the result it would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from atedm.lab.extra import optional
from atedm.plans.plan import Plan
from atedm.tuning.drawing import Easel, key_of
from atedm.tuning.space import OWN, OutOfSpace, Space

FIRST = 2
"""Prompts after which a plan that is behind is given up."""
_MOST_TRIALS = 400
"""Where proposals cost nothing, because they were measured before."""
_SHARE_THAT_GOES_ON = 25.0
"""Percent of the plans that were drawn in full, of which one must be among the best to be drawn in full."""


@dataclass(frozen=True)
class Tried:
    """A plan that was measured."""

    name: str
    plan: Plan
    #: Cost, as a share of the dense run, by the measure of the budget.
    share: float
    #: In dB to the dense image, by prompt; few where it was given up.
    distances: tuple[float, ...]
    #: Whether all prompts were drawn.
    is_whole: bool

    @property
    def key(self) -> str:
        """Name of what the plan does."""
        return key_of(self.plan)

    @property
    def distance(self) -> float:
        """Mean distance in dB."""
        return sum(self.distances) / len(self.distances)


@dataclass
class Search:
    """One search, and what it has found so far."""

    easel: Easel
    space: Space
    #: Dense images that it may take the time of, all counted.
    limit: float
    seed: int = 0
    #: Dense images that are spent.
    spent: float = 0.0
    #: By `key_of`.
    tried: dict[str, Tried] = field(default_factory=dict)
    #: Called after every image with what is said of it.
    told: Callable[[Search], None] = lambda search: None
    #: Called whenever a better plan is found.
    improved: Callable[[Search], None] = lambda search: None
    _drawn: dict[str, int] = field(default_factory=dict)

    @property
    def best(self) -> Tried | None:
        """The whole plan nearest to dense so far; of equals the cheapest."""
        return next(iter(self.finalists(1)), None)

    def finalists(self, count: int) -> list[Tried]:
        """Return the best ``count`` plans of which all prompts were drawn, the best first."""
        whole = [tried for tried in self.tried.values() if tried.is_whole]
        return sorted(whole, key=lambda tried: (-tried.distance, tried.share))[:count]

    def run(self) -> None:
        """Search until the images are spent."""
        count = len(self.easel.prompts)
        self._draw(self.easel.dense, count, 1.0)
        for name, plan in self.space.singles():
            if key_of(plan) not in self.tried and self._affords(plan, count):
                self._measure(name, plan, count)
        study, given_up = self._study(), optional("optuna", "tune").trial.TrialState.PRUNED
        first = min(FIRST, count)
        for number in range(_MOST_TRIALS):
            trial, name = study.ask(), f"trial {number}"
            try:
                plan = self.space.plan(self.space.point(trial))
            except OutOfSpace:
                study.tell(trial, state=given_up)
                continue
            tried = self.tried.get(key_of(plan))
            if tried is None or not tried.is_whole:
                if not self._affords(plan, first):
                    return
                tried = self._measure(name, plan, first)
            if first < count:
                trial.report(sum(tried.distances[:first]) / first, 1)
                if trial.should_prune():
                    study.tell(trial, state=given_up)
                    continue
            if not tried.is_whole:
                if not self._affords(plan, count):
                    return
                tried = self._measure(name, plan, count)
            study.tell(trial, tried.distance)

    def _affords(self, plan: Plan, count: int) -> bool:
        missing = count - self._drawn.get(key_of(plan), 0)
        return self.spent + self.space.share(plan) * missing <= self.limit

    def _measure(self, name: str, plan: Plan, count: int) -> Tried:
        share = self.space.share(plan)
        self._draw(plan, count, share)
        before = self.best
        distances = tuple(self.easel.distances(plan, count))
        tried = Tried(name, plan, share, distances, is_whole=count == len(self.easel.prompts))
        self.tried[tried.key] = tried
        if self.best is not before:
            self.improved(self)
        return tried

    def _draw(self, plan: Plan, count: int, share: float) -> None:
        """Draw, and count what it takes as if nothing had been there, so that every sitting counts alike."""
        key = key_of(plan)
        self.easel.files(plan, count, lambda: self.told(self))
        self.spent += share * max(0, count - self._drawn.get(key, 0))
        self._drawn[key] = max(count, self._drawn.get(key, 0))
        self.told(self)

    def _study(self) -> Any:
        """Return Optuna's study, whose first proposals follow from the single techniques."""
        optuna = optional("optuna", "tune")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=8),
            pruner=optuna.pruners.PercentilePruner(_SHARE_THAT_GOES_ON, n_startup_trials=4),
        )
        fewer = [one for one in self.tried.values() if one.plan.method is None and one.plan.cache is None]
        leading = max(fewer, key=lambda one: one.distance).plan.scheduler if fewer else None
        for single in fewer:
            study.enqueue_trial({"scheduler": single.plan.scheduler or OWN, "cached": 0.0, "pruned": 0.0})
        for values in self.space.starts(leading or OWN):
            study.enqueue_trial(values)
        return study
