"""The search: single techniques at the budget first, then what Optuna proposes, until the images are spent.

Everything that is measured is kept on disk, and everything else follows from it and from the seed. So a search that was
killed is run again from its start, finds what it had measured, and goes on to the result it would have had.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from atedm.lab.extra import optional
from atedm.plans.plan import Plan
from atedm.tuning.drawing import Easel, key_of
from atedm.tuning.space import OWN, OutOfSpace, Space, Values

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
    _started: float = field(default_factory=time.monotonic)
    _worked: float = 0.0

    @property
    def best(self) -> Tried | None:
        """The whole plan nearest to dense so far; of equals the cheapest."""
        return next(iter(self.finalists(1)), None)

    def finalists(self, count: int) -> list[Tried]:
        """Return the best ``count`` plans of which all prompts were drawn, the best first."""
        whole = [tried for tried in self.tried.values() if tried.is_whole]
        return sorted(whole, key=lambda tried: (-tried.distance, tried.share))[:count]

    @property
    def seconds_left(self) -> float | None:
        """Estimate by the images that were drawn in this sitting; None before there are any."""
        if not self._worked:
            return None
        return (time.monotonic() - self._started) / self._worked * max(0.0, self.limit - self.spent)

    def run(self) -> None:
        """Search until the images are spent."""
        count = len(self.easel.prompts)
        self._draw(self.easel.dense, count, 1.0)
        for name, plan in self.space.singles():
            self._whole(name, plan)
        for number, values in self._proposals():
            try:
                plan = self.space.plan(values)
            except OutOfSpace:
                number.pruned()
                continue
            first = min(FIRST, count)
            tried = self.tried.get(key_of(plan))
            if tried is None or not tried.is_whole:
                if not self._affords(plan, first):
                    return
                tried = self._measure(number.name, plan, first)
            if first < count and not number.goes_on(sum(tried.distances[:first]) / first):
                continue
            if not tried.is_whole:
                if not self._affords(plan, count):
                    return
                tried = self._measure(number.name, plan, count)
            number.told(tried.distance)

    def _whole(self, name: str, plan: Plan) -> None:
        if key_of(plan) not in self.tried and self._affords(plan, len(self.easel.prompts)):
            self._measure(name, plan, len(self.easel.prompts))

    def _affords(self, plan: Plan, count: int) -> bool:
        share = self.space.costs.share(plan, self.space.dense_steps)
        return self.spent + share * (count - self._drawn.get(key_of(plan), 0)) <= self.limit

    def _measure(self, name: str, plan: Plan, count: int) -> Tried:
        share = self.space.costs.share(plan, self.space.dense_steps)
        self._draw(plan, count, share)
        before = self.best
        distances = tuple(self.easel.distances(plan, count))
        tried = Tried(name, plan, share, distances, is_whole=count == len(self.easel.prompts))
        self.tried[key_of(plan)] = tried
        if self.best is not before:
            self.improved(self)
        return tried

    def _draw(self, plan: Plan, count: int, share: float) -> None:
        """Draw, and count what it takes as if nothing had been there, so that every sitting counts alike."""
        key = key_of(plan)

        def one() -> None:
            self._worked += share
            self.told(self)

        self.easel.files(plan, count, one)
        self.spent += share * max(0, count - self._drawn.get(key, 0))
        self._drawn[key] = max(count, self._drawn.get(key, 0))
        self.told(self)

    def _proposals(self) -> Iterator[tuple[_Trial, Values]]:
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
        for number in range(_MOST_TRIALS):
            trial = study.ask()
            found = _Trial(study, trial, f"trial {number}")
            yield found, self.space.point(trial)


@dataclass
class _Trial:
    """One of Optuna's trials, which is told how it goes."""

    study: Any
    trial: Any
    name: str

    def goes_on(self, distance: float) -> bool:
        """Report the mean over the first prompts; whether the others are worth drawing."""
        self.trial.report(distance, 1)
        if self.trial.should_prune():
            self.pruned()
            return False
        return True

    def told(self, distance: float) -> None:
        """Report the mean over all prompts."""
        self.study.tell(self.trial, distance)

    def pruned(self) -> None:
        """Give it up."""
        optuna = optional("optuna", "tune")
        self.study.tell(self.trial, state=optuna.trial.TrialState.PRUNED)


def with_record(plan: Plan, **found: Any) -> Plan:
    """Return a plan with more said of how it was found."""
    return dataclasses.replace(plan, found={**plan.found, **found})
