"""Cost: the share of the dense model's multiply-accumulates (MACs) over a run, counted by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atedm.costs.flops import flop_counter
from atedm.lab.methods.candidates import Candidate, Dense

#: Takes one step of a run.
Step: TypeAlias = Callable[[], object]

LATE = 9
"""Runs of single steps begin after this many times as many steps, so that no schedule spares anything in them."""


def counted_run(pipe: Any, candidate: Candidate, call: dict[str, Any], steps: int) -> int:
    """Count the MACs of the U-Net over one run of a pipeline.

    Args:
        pipe: A text-to-image pipeline, as it is.
        candidate: What is applied.
        call: Arguments of the pipeline but for steps and noise.
        steps: Denoising steps before the candidate leaves some out.
    """
    counters: list[FlopCounterMode] = []

    def start(*_: Any) -> None:
        counters.append(flop_counter())
        counters[-1].__enter__()  # type: ignore[no-untyped-call]

    def stop(*_: Any) -> None:
        counters[-1].__exit__(None, None, None)  # type: ignore[no-untyped-call]

    hooks = [pipe.unet.register_forward_pre_hook(start), pipe.unet.register_forward_hook(stop)]
    noise = torch.Generator("cpu").manual_seed(0)
    try:
        with candidate.applied(pipe), sdpa_kernel(SDPBackend.MATH):
            pipe(**call, num_inference_steps=candidate.steps_of(steps), generator=noise, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    return sum(int(counter.get_total_flops()) for counter in counters) // 2


@contextmanager
def run_of_steps(
    unet: UNet2DConditionModel, call: dict[str, Any], candidate: Candidate, steps: int, *, before: int = 0
) -> Iterator[Step]:
    """Apply a candidate to a U-Net, and yield what takes the next step of a run.

    Args:
        unet: On any device.
        call: Its arguments but for the timestep.
        candidate: What is applied.
        steps: How many can be taken.
        before: How many steps the run has had before.
    """
    timesteps = torch.linspace(999, 0, before + steps)[before:]
    if unet.device.type != "meta":  # there the numbers would be lost
        timesteps = timesteps.to(unet.device)
    sample, others = call["sample"], {name: value for name, value in call.items() if name != "sample"}
    left = iter(timesteps)
    scheduler = SimpleNamespace(timesteps=timesteps)  # DeepCache looks the step up there
    with candidate.applied(SimpleNamespace(unet=unet, scheduler=scheduler)):
        yield lambda: unet(sample, next(left), **others)  # tomesd looks for the sample among the positional arguments


@torch.no_grad()
def late_step_cost(unet: UNet2DConditionModel, call: dict[str, Any], candidate: Candidate) -> float:
    """Return the cost of a step in which no schedule spares anything; of what works in cycles, the mean of a cycle.

    Args:
        unet: On the meta device, where nothing is computed.
        call: Its arguments but for the timestep, on the meta device too.
        candidate: What is applied.
    """

    def count(of: Candidate, steps: int) -> int:
        counter = flop_counter()
        with run_of_steps(unet, call, of, steps, before=LATE * steps) as step, sdpa_kernel(SDPBackend.MATH), counter:
            for _ in range(steps):
                step()
        return int(counter.get_total_flops())

    return count(candidate, candidate.cycle) / candidate.cycle / count(Dense(), 1)
