"""Forecast: in some steps the U-Net does not run, and its output is extrapolated from the last two that it gave.

The run keeps the scheduler and all of its steps, so it goes where the dense run goes. What differs is only how far an
output lies off the line through the two before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from atedm.hosts.runs import is_listed, step_position
from atedm.plans.extrapolation import extrapolated


@contextmanager
def forecast(pipe: Any, full: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Let the U-Net of a pipeline run in some steps only, for the length of a ``with`` block.

    Args:
        pipe: Anything with a ``unet`` and a ``scheduler`` that calls the U-Net once a step.
        full: Says of a number of steps in which of them the U-Net runs, the first one among them.
    """
    unet = pipe.unet
    run = unet.forward
    had_its_own = "forward" in vars(unet)
    #: Step and output of the last two calls, the older one first.
    given: list[tuple[int, Tensor]] = []
    start, last = 0, -1

    def forward(sample: Tensor, timestep: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal start, last
        step = step_position(timestep).step if isinstance(timestep, Tensor) and is_listed(timestep) else None
        if step is None or step <= last or not given or given[-1][1].shape[0] != sample.shape[0]:
            start = step or 0  # a run begins, not always with the first step of the list
            given.clear()
        last = -1 if step is None else step
        if given and step is not None and step - start not in full(len(pipe.scheduler.timesteps) - start):
            output = extrapolated(given, step)
            return UNet2DConditionOutput(sample=output) if options.get("return_dict", True) else (output,)
        result = run(sample, timestep, *arguments, **options)
        if step is not None:
            given.append((step, result[0].detach()))
            del given[:-2]
        return result

    unet.forward = forward
    try:
        yield
    finally:
        if had_its_own:
            unet.forward = run
        else:
            del unet.forward
