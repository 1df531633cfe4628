"""What is tried: every point of the search lies on the budget, and says how it is spent."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from atedm.costs.budget import least_rate, with_fewer_dense_steps
from atedm.method.contract import Method
from atedm.method.matched import DENSE_SHARES, Matched
from atedm.method.presets import METHODS
from atedm.plans.plan import Cache, Plan
from atedm.plans.schedulers import SCHEDULERS
from atedm.tuning.costs import Arithmetic
from atedm.tuning.timing import Times

OWN = "own"
"""The model's own scheduler."""
_CACHED = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares of the steps that run by DeepCache."""
HIGHEST_RATE = 0.99
"""That a search goes up to."""
_HALVINGS = 20
"""Of the range of rates. More would give other rates in the sixth digit, and a search that goes on other plans."""

Values = dict[str, Any]
"""A point of the search, by the names of `Space.point`."""


class OutOfSpace(ValueError):
    """No plan at this point keeps to the budget."""


@dataclass(frozen=True)
class Space:
    """Plans of one model at one budget."""

    #: What every plan has in common: the model, dense steps, guidance and size.
    base: Plan
    costs: Arithmetic | Times
    budget: float
    #: Branches of DeepCache that may be used, None for a forecast; empty where steps cannot be left out.
    branches: tuple[int | None, ...] = (0, None)
    #: Schedulers that may take the place of the model's own.
    schedulers: tuple[str, ...] = tuple(SCHEDULERS)
    #: Methods by name, as they are for this kind of model.
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    @property
    def _matched(self) -> Matched:
        matched = self.methods["matched"]
        assert isinstance(matched, Matched)
        return matched

    @property
    def dense_steps(self) -> int:
        """Steps of the dense run."""
        return self.base.steps

    def share(self, plan: Plan) -> float:
        """Return what a run by a plan costs, as a share of the dense run."""
        return self.costs.share(plan, self.dense_steps)

    def point(self, trial: Any) -> Values:
        """Ask an Optuna trial for a point. What has no use at a point is not asked for."""
        values: Values = {
            "scheduler": trial.suggest_categorical("scheduler", [OWN, *self.schedulers]),
            "cached": trial.suggest_categorical("cached", list(_CACHED if self.branches else _CACHED[:1])),
            "pruned": trial.suggest_float("pruned", 0.0, 1.0, step=0.125),
        }
        if values["cached"]:
            values["bend"] = trial.suggest_float("bend", 0.6, 1.8, step=0.2)
            values["branch"] = trial.suggest_categorical("branch", list(self.branches))
        if values["pruned"]:
            if self._matched.level_factors:
                values["level_2"] = trial.suggest_float("level_2", 0.5, 1.0, step=0.1)
            if self._matched.dense_share:
                values["dense"] = trial.suggest_categorical("dense", list(DENSE_SHARES))
            values["own_update"] = trial.suggest_float("own_update", 0.25, 1.0, step=0.25)
            values["cover"] = trial.suggest_float("cover", 0.3, 0.7, step=0.1)
        # 0.30000000000000004 is no value to write down.
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}

    def plan(self, values: Values) -> Plan:
        """Return the plan at a point: at ``pruned`` 0 as many steps as the budget has without pruning, at 1 as many as
        the highest rate allows, each step pruned as much as that takes.

        Raises:
            OutOfSpace: If there is none.
        """  # noqa: D205
        method = self._matched
        if values["pruned"]:
            method = dataclasses.replace(
                method,
                own_update_share=values["own_update"],
                cover_share=values["cover"],
                level_factors=((2, values["level_2"]),) if "level_2" in values else method.level_factors,
                dense_share=values.get("dense", method.dense_share),
            )

        def at(steps: int, method: Method | None) -> Plan:
            share = values["cached"]
            cache = Cache(max(1, round(steps * (1 - share))), values["bend"], values["branch"]) if share else None
            scheduler = None if values["scheduler"] == OWN else values["scheduler"]
            return dataclasses.replace(self.base, steps=steps, method=method, cache=cache, scheduler=scheduler)

        fewest = self._most_steps(lambda steps: at(steps, None))
        most = self._most_steps(lambda steps: at(steps, method))
        steps = fewest + round(values["pruned"] * (most - fewest))
        if steps < 1:
            raise OutOfSpace(f"not one step at {values} keeps to a budget of {self.budget}")
        return self.fitted(at(steps, method))

    def fitted(self, plan: Plan) -> Plan:
        """Return ``plan`` with the least rate of its method that keeps to the budget, or without one if none is needed.

        Raises:
            OutOfSpace: If no rate up to `HIGHEST_RATE` does.
        """
        if self._fits(plan, 0.0):
            return _at(plan, 0.0)
        if not self.keeps(plan):
            raise OutOfSpace(f"{plan.what()} costs more than {self.budget:.3f} at any rate")
        return _at(plan, least_rate(lambda rate: self._fits(plan, rate), HIGHEST_RATE, _HALVINGS))

    def keeps(self, plan: Plan) -> bool:
        """Whether a plan keeps to the budget without pruning, or at the highest rate of its method."""
        return self._fits(plan, 0.0) or (plan.method is not None and self._fits(plan, HIGHEST_RATE))

    def _fits(self, plan: Plan, rate: float) -> bool:
        return self.share(_at(plan, rate)) <= self.budget

    def _most_steps(self, plan: Callable[[int], Plan]) -> int:
        """Return the largest number of steps, up to those of the dense run, at which a plan keeps to the budget."""
        return bisect_left(range(1, self.dense_steps + 1), True, key=lambda steps: not self.keeps(plan(steps)))

    def singles(self) -> Iterator[tuple[str, Plan]]:
        """Yield every single technique at the budget, by name: a plan may be none of them, but never worse than all."""
        for scheduler in (None, *self.schedulers):
            steps = self._most_steps(lambda steps: dataclasses.replace(self.base, steps=steps))
            if steps:
                name = "fewer steps" + (f", {scheduler}" if scheduler else "")
                yield name, dataclasses.replace(self.base, steps=steps, scheduler=scheduler)
        for technique, branch in (("DeepCache", 0), ("forecast", None)):
            every = range(1, self.dense_steps) if branch in self.branches else ()
            cached = (dataclasses.replace(self.base, cache=Cache(self.dense_steps - n, 1.0, branch)) for n in every)
            if found := next(filter(self.keeps, cached), None):
                yield technique, found
        for name in ("matched", "paper", "dagger"):
            if self.costs.of == "time" and name != "matched":
                continue  # no step of theirs was timed
            if name == "dagger" and not self._matched.level_factors:
                continue  # where there are no levels it is "paper"
            for method in with_fewer_dense_steps(self.methods[name]):
                try:
                    yield name, self.fitted(dataclasses.replace(self.base, method=method))
                except (OutOfSpace, ValueError):
                    continue
                break

    def starts(self, scheduler: str) -> Iterator[Values]:
        """Yield points that are good on the model that ships, to begin with, by the scheduler that leads."""
        usual: Values = {"bend": 1.0, "branch": None, "own_update": 0.5, "cover": 0.4}
        usual |= {"level_2": 0.8} if self._matched.level_factors else {}
        usual |= {"dense": 0.3, "own_update": 1.0} if self._matched.dense_share else {}
        for pruned in (0.125, 0.25):
            yield {**usual, "scheduler": scheduler, "cached": 0.0, "pruned": pruned}
        for cached, pruned in ((0.3, 0.5), (0.4, 0.5), (0.5, 0.0), (0.6, 0.0)) if None in self.branches else ():
            yield {**usual, "scheduler": OWN, "cached": cached, "pruned": pruned}


def _at(plan: Plan, rate: float) -> Plan:
    method = None if rate == 0 else dataclasses.replace(plan.method, rate=rate)  # type: ignore[type-var]
    return dataclasses.replace(plan, method=method)
