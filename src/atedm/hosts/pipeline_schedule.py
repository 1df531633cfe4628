"""The list of steps that a pipeline's scheduler holds, for transformers that are handed a number made of an element.

How the noise falls is the scheduler's choice: FLUX.1 dev at 1024 px spends 17 of 28 steps above 70 % noise. So the
noise alone does not say which share of a run is done.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from atedm.hosts.runs import StepPosition

_ROUNDING = 0.004
"""How far the noise may be from that of a step on the list: pipelines round it to bfloat16."""


class PipelineSchedule:
    """Tells steps by the scheduler that a pipeline has when the model is called. A copy knows of no pipeline.

    After a step that is not on the list, the rest of that run is told without it: the model is called by another
    pipeline, whose scheduler is another.
    """

    def __init__(self, target: Any = None) -> None:
        """Take what a method was applied to. It is not kept alive, its last scheduler is."""
        try:
            self._target = None if target is None else weakref.ref(target)
        except TypeError:  # a class that allows none
            self._target = None
        self._scheduler: Any = None
        self._timesteps: Tensor | None = None
        self._noise: list[float] = []
        self._has_missed = False

    def find(self, noise: float, last: int | None) -> StepPosition | None:
        """Return where a step stands; None if the scheduler has no such step, or lacked one before in this run.

        Args:
            noise: Of the step, in [0, 1]. Of steps with the same noise the first is meant.
            last: Index of the step before, with more noise; None in the first step of a run.
        """
        self._has_missed &= last is not None
        position = None if self._has_missed else self._nearest(noise, last)
        self._has_missed = position is None
        return position

    def _nearest(self, noise: float, last: int | None) -> StepPosition | None:
        self._scheduler = getattr(self._target() if self._target else None, "scheduler", self._scheduler)
        timesteps = getattr(self._scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or not len(timesteps):
            return None
        if timesteps is not self._timesteps:  # once a run, because its device is waited for
            most = getattr(getattr(self._scheduler, "config", None), "num_train_timesteps", 1000)
            self._timesteps, self._noise = timesteps, (timesteps.cpu().double() / most).tolist()
        step = min(range(len(self._noise)), key=lambda index: abs(self._noise[index] - noise))
        if last is not None and step <= last < len(self._noise) - 1:  # rounded to what is nearest to the one before
            step = last + 1
        if abs(self._noise[step] - noise) > _ROUNDING:
            return None
        return StepPosition(step, step / len(self._noise))

    def __getstate__(self) -> dict[str, Any]:
        return vars(PipelineSchedule())
