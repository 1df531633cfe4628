"""Forecast: in some steps the model does not run, and its output is extrapolated from the last two that it gave.

The run keeps the scheduler and all of its steps, so it goes where the dense run goes. What differs is only how far an
output lies off the line through the two before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from atedm.hosts.diffusers_dit import known_family
from atedm.hosts.models import find_model, is_transformer
from atedm.hosts.noise_steps import NoiseSteps, text_key
from atedm.hosts.pipeline_schedule import PipelineSchedule
from atedm.hosts.runs import is_listed, step_position
from atedm.plans.extrapolation import extrapolated


def can_forecast(model: Any) -> bool:
    """Whether the outputs of a model are tensors that can be extrapolated; those of Z-Image are lists of them."""
    return type(model).__name__ != "ZImageTransformer2DModel"


@contextmanager
def forecast(pipe: Any, full: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Let the model of a pipeline run in some steps only, for the length of a ``with`` block.

    Args:
        pipe: Anything with a ``unet`` or a ``transformer`` and a ``scheduler``. A step may take several calls, each
            with a text of its own; a U-Net is called once a step.
        full: Says of a number of steps in which of them the model runs, the first one among them.

    Raises:
        ValueError: If the outputs of the model are no tensors.
    """
    model = find_model(pipe)
    if not can_forecast(model):
        raise ValueError(f"the outputs of a {type(model).__name__} are lists, which cannot be forecast")
    run, had_its_own = model.forward, "forward" in vars(model)
    names = [*inspect.signature(type(model).forward).parameters][1:]
    steps = _Steps(model, NoiseSteps(PipelineSchedule(pipe)))

    def forward(*arguments: Any, **named: Any) -> Any:
        given = dict(zip(names, arguments, strict=False)) | named
        step, history = steps.find(given, len(given[names[0]]))
        if step is not None and history and step - steps.start not in full(len(pipe.scheduler.timesteps) - steps.start):
            return steps.returned(extrapolated(history, step))
        result = run(*arguments, **named)
        if step is not None:
            steps.kind = type(result)
            history.append((step, result[0].detach()))
            del history[:-2]
        return result

    model.forward = forward
    try:
        yield
    finally:
        if had_its_own:
            model.forward = run
        else:
            del model.forward


@dataclass
class _Steps:
    """Which step of a run a call is, and what the calls with its text gave before."""

    model: Any
    noise: NoiseSteps
    #: First step of the run, which is not always the first of the scheduler's list.
    start: int = 0
    last: int = -1
    #: What a call returns: a tuple, or a class of diffusers with a ``sample``.
    kind: type[Any] = tuple
    #: Step and output of the last two calls that ran, by text, the older one first.
    histories: dict[Any, list[tuple[int, Tensor]]] = field(default_factory=dict)
    #: Texts that the current step was called with.
    called: set[Any] = field(default_factory=set)

    def find(self, given: dict[str, Any], images: int) -> tuple[int | None, list[tuple[int, Tensor]]]:
        """Return the step of a call on so many images, None where it is no step of a list, and its history."""
        step, text = self._locate(given)
        again = step == self.last and text in self.called
        if step is None or step < self.last or again or any(len(h[-1][1]) != images for h in self.histories.values()):
            self.start = step or 0
            self.histories.clear()
        if step != self.last or again:
            self.called.clear()
        self.called.add(text)
        self.last = -1 if step is None else step
        history = self.histories.get(text, [])
        if step is not None:
            self.histories[text] = history
        return step, history

    def _locate(self, given: dict[str, Any]) -> tuple[int | None, Any]:
        if not is_transformer(self.model):
            timestep = given["timestep"]
            listed = isinstance(timestep, Tensor) and is_listed(timestep)
            return (step_position(timestep).step if listed else None), None
        family = known_family(self.model)
        text = given.get(family.text)
        position, _ = self.noise.locate(given[family.timestep], family.noise, text)
        return position.step, text_key(text)

    def returned(self, output: Tensor) -> Any:
        """Return an output as the model does."""
        return (output,) if issubclass(self.kind, tuple) else self.kind(sample=output)
