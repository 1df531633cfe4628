"""Which step a call of a transformer is, and what its context remembers.

Some pipelines hand over elements of the scheduler's list, as those of U-Nets do (`atedm.hosts.runs`). FLUX and
Qwen-Image hand over a number made of one. It is looked up in the list (`atedm.hosts.pipeline_schedule`); without a
pipeline, steps are told by the noise, which falls along a run. A step may take several calls, with the prompt and
without, so what is remembered is kept by the text that a call is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.hosts.pipeline_schedule import PipelineSchedule
from atedm.hosts.runs import Run, StepPosition, is_listed
from atedm.method.contract import Memory

_SAME = 1e-6
"""Noise that differs by less is that of one step."""


@dataclass
class Context:
    """What the calls with one text remember."""

    #: Held on to, so that no other text can take its place in memory.
    text: Any
    step: int = -1
    #: Whether a step came twice, so that one cannot tell which of two images that share a text comes next.
    is_ambiguous: bool = False
    #: By span.
    memories: dict[str, Memory] = field(default_factory=dict)

    def memory_of(self, span: str) -> Memory:
        """What a span remembers in this context."""
        return self.memories.setdefault(span, Memory())


@dataclass
class NoiseSteps:
    """Tells steps and runs apart. A copy knows of none."""

    schedule: PipelineSchedule = field(default_factory=PipelineSchedule)
    run: Run = field(default_factory=Run)
    noise: float | None = None
    step: int = -1
    #: Where the last step stands that was told by its noise.
    position: StepPosition = field(default_factory=lambda: StepPosition(0, 0.0))
    contexts: dict[Any, Context] = field(default_factory=dict)

    def locate(self, timestep: Any, to_noise: Callable[[float], float], text: Any) -> tuple[StepPosition, Context]:
        """Tell where a call stands, and which context it is of, whose memories are set for the step.

        Args:
            timestep: What the model was handed. If it is no element of a list, its value is read, for which the device
                is waited for.
            to_noise: Noise in [0, 1] by the value of a timestep.
            text: What the model was handed as text, a tensor or a list of them.
        """
        last = self.step
        if isinstance(timestep, Tensor) and is_listed(timestep) and timestep.device.type != "meta":
            before = self.run.timestep
            position, _ = self.run.locate(timestep)
            is_new = self.run.timestep is not before or position.step < last
        else:
            noise = _noise_of(timestep, to_noise)
            is_new = self.noise is None or noise > self.noise + _SAME
            step = 0 if is_new else last + (noise < (self.noise or 0.0) - _SAME)
            if is_new or step > last:
                listed = self.schedule.find(noise, None if is_new else last)
                self.position = listed or StepPosition(step, min(max(1 - noise, 0.0), 1 - 1e-3))
            self.noise, position = noise, self.position
        self.step = position.step
        if is_new:
            self.contexts.clear()
        elif position.step != last:  # a text that is made anew in every step must not pile up
            self.contexts = {key: c for key, c in self.contexts.items() if c.step >= position.step - 1}
        context = self.contexts.setdefault(text_key(text), Context(text))
        context.is_ambiguous |= context.step == position.step
        follows = context.step == position.step - 1 and not context.is_ambiguous
        context.step = position.step
        for memory in context.memories.values():
            memory.begin_step(follows=follows)
        return position, context

    def __getstate__(self) -> dict[str, Any]:
        return vars(NoiseSteps())


def _noise_of(timestep: Any, to_noise: Callable[[float], float]) -> float:
    """Noise of a timestep, of several the highest; of one without a value none, as at the end of a run."""
    if not isinstance(timestep, Tensor):
        return to_noise(float(timestep))
    if timestep.device.type == "meta":
        return 0.0
    ends: list[float] = torch.stack(timestep.float().aminmax()).tolist()  # both at once: the device is waited for
    return max(map(to_noise, ends))


def text_key(text: Any) -> Any:
    """Return something that is the same for the same tensors in memory."""
    if isinstance(text, list | tuple):
        return tuple(text_key(part) for part in text)
    if not isinstance(text, Tensor):
        return id(text)
    try:
        return text.data_ptr(), tuple(text.shape)
    except RuntimeError:  # inside a transform of torch.func, or without storage
        return id(text)
