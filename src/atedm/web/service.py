"""What the page asks of: models, the limits of what may be asked, and who is drawing."""

import itertools
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from atedm.app.equal_cost import can_prune, has_transformer, method_at, within_budget
from atedm.app.models import load_pipeline
from atedm.app.request import Request
from atedm.costs.budget import run_cost
from atedm.method.contract import Method
from atedm.plans.fingerprint import refuse_other_model
from atedm.plans.plan import Plan
from atedm.suits import Suits, draws_in_few_steps, suits
from atedm.web.job import Event, run_job
from atedm.words import check_name, is_number

BY_PLAN = "plan"
"""Name of what a plan does, among those of methods."""
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_PROMPT = 1000
"""Characters."""
MAX_SEED = 2**32 - 1


class CostRange(NamedTuple):
    """What the slider offers, in whole percents of the dense arithmetic."""

    #: With nine tenths of the tokens dropped.
    lowest: int
    #: With one twentieth dropped, but less than dense.
    highest: int
    #: With the method as it is.
    usual: int


@dataclass
class Service:
    """Opens the models that it was given the names of, at least one, and no others; draws one image at a time."""

    models: tuple[str, ...]
    folder: Path
    device: str | None = None
    #: What is offered beside the methods, for the first model.
    plan: Plan | None = None
    _pipes: dict[str, Any] = field(default_factory=dict)
    #: Held while a pipeline is opened or draws. Others wait in the queue of the page.
    _busy: threading.Lock = field(default_factory=threading.Lock)
    #: What stops a running job, by visitor.
    _running: dict[str, threading.Event] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("name at least one model, such as tiny")
        self.models = tuple(dict.fromkeys(self.models))

    def suits(self, model: str) -> Suits:
        """Return what suits a model, which must be one of `models`."""
        check_name("model", model, self.models)
        return suits(model)

    def methods(self, model: str) -> dict[str, str]:
        """Return names of the methods that can prune a model, by their label on the page, the default first."""
        few = draws_in_few_steps(model)
        planned = {"By the plan": BY_PLAN} if self.plan is not None and model == self.models[0] else {}
        named = {"Matched (ours)": "matched"}
        named |= {"AT-EDM†": "turbo"} if few else {"AT-EDM†": "dagger", "AT-EDM (the paper)": "paper"}
        pipe = self.pipe(model)
        found = {label: name for label, name in named.items() if can_prune(pipe, self._method(pipe, name))}
        if not found:
            raise ValueError(f"there is nothing to prune in {model}: it has no attention blocks known here")
        return planned | found

    def plan_of(self, method: str) -> Plan | None:
        """Return the plan, if that is what ``method`` names."""
        return self.plan if method == BY_PLAN else None

    def cost_range(self, model: str, method: str, steps: int) -> CostRange:
        """Return what runs with a method can cost.

        Raises a `TypeError` if the model has no U-Net, and a `ValueError` if a name is unknown or the steps are out of
        their range.
        """
        _check_range("Steps", steps, 1, MAX_STEPS)
        pipe = self.pipe(model)
        check_name("method", method, self.methods(model).values())
        if (plan := self.plan_of(method)) is not None:
            cost = round(100 * plan.found["cost"])
            return CostRange(cost, cost, cost)

        def percent(rate: float | None) -> float:
            return 100 * run_cost(pipe, self._method(pipe, method, rate), steps=int(steps))

        lowest, highest = math.ceil(percent(0.9)), min(math.floor(percent(0.05)), 99)
        return CostRange(lowest, highest, min(max(lowest, round(percent(None))), highest))

    @staticmethod
    def _method(pipe: Any, name: str, rate: float | None = None) -> Method:
        return method_at(name, rate, transformer=has_transformer(pipe))

    def pipe(self, model: str) -> Any:
        """Return the pipeline of one of `models`, opened when it is first asked for.

        Raises a `ValueError` if the plan is for another model than the first one, or does not say what it costs.
        """
        check_name("model", model, self.models)
        if model in self._pipes:  # without waiting for whoever draws
            return self._pipes[model]
        with self._busy:
            if model not in self._pipes:
                self._pipes.clear()  # two large ones rarely fit
                pipe = load_pipeline(model, device=self.device)
                if self.plan is not None and model == self.models[0]:
                    refuse_other_model(self.plan.model, pipe)
                    if "cost" not in self.plan.found:
                        raise ValueError("this plan does not say what it costs; take one that `atedm tune` wrote")
                self._pipes[model] = pipe
            return self._pipes[model]

    def request(
        self, model: str, prompt: str, method: str, cost: float, steps: int, guidance: float, seed: int
    ) -> Request:
        """Check what a visitor asks for, because limits in a browser can be got around, and solve for the rate.

        Raises a `ValueError` that says what would work if something is out of its range.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("The prompt is empty: write what to draw, or choose an example.")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT} are read.")
        _check_range("Steps", steps, 1, MAX_STEPS)
        _check_range("Guidance", guidance, 0, MAX_GUIDANCE)
        _check_range("The seed", seed, 0, MAX_SEED)
        offered = self.cost_range(model, method, int(steps))
        if (plan := self.plan_of(method)) is not None:  # whose steps and cost are its own
            return Request.by_plan((prompt.strip(),), plan, guidance=float(guidance), seed=int(seed))
        _check_range("The cost", cost, offered.lowest, offered.highest)
        pipe = self.pipe(model)
        request = Request((prompt.strip(),), self._method(pipe, method), int(steps), float(guidance), seed=int(seed))
        return request if cost == offered.usual else within_budget(pipe, request, cost / 100)

    def draw(self, visitor: str, model: str, request: Request) -> Iterator[Event]:
        """Draw dense and pruned, and yield what happens. Raises `Stopped` after `stop` for the same visitor."""
        pipe = self.pipe(model)
        stop = self._running[visitor] = threading.Event()
        job = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(self._numbers):03d}"
        try:
            with self._busy:
                yield from run_job(pipe, request, job, model, stop)
        finally:
            if self._running.get(visitor) is stop:
                del self._running[visitor]

    def stop(self, visitor: str) -> bool:
        """End what is being drawn for a visitor; return whether there was anything."""
        if stop := self._running.get(visitor):
            stop.set()
        return stop is not None


def _check_range(what: str, value: float, lowest: float, highest: float) -> None:
    if not is_number(value) or not lowest <= value <= highest:
        raise ValueError(f"{what} must be from {lowest:.10g} to {highest:.10g}, not {value}.")
