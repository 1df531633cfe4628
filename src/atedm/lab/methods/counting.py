"""Cost: the share of the dense model's multiply-accumulates (MACs) over a run, counted by torch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from atedm.costs.architectures import run_once
from atedm.costs.flops import flop_counter
from atedm.costs.transformer_calls import at_noise
from atedm.hosts.models import find_model, is_transformer
from atedm.lab.methods.candidates import Candidate, Dense

LATE = 9
"""Runs of single steps begin after this many times as many steps, so that no schedule spares anything in them."""


def counted_run(pipe: Any, candidate: Candidate, call: dict[str, Any], steps: int) -> int:
    """Count the MACs of the model over one run of a pipeline with a candidate.

    ``call`` is what the pipeline takes besides steps and noise; ``steps`` counts before the candidate leaves some out.
    """
    counters = []
    within = ExitStack()

    def start(*_: Any) -> None:
        counters.append(within.enter_context(flop_counter()))

    model = find_model(pipe)
    hooks = [model.register_forward_pre_hook(start), model.register_forward_hook(lambda *_: within.close())]
    noise = torch.Generator("cpu").manual_seed(0)
    try:
        with candidate.applied(pipe), sdpa_kernel(SDPBackend.MATH), within:
            pipe(**call, num_inference_steps=candidate.steps_of(steps), generator=noise, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    return sum(int(counter.get_total_flops()) for counter in counters) // 2


@contextmanager
def run_of_steps(model: Any, call: dict[str, Any], candidate: Candidate, steps: int) -> Iterator[Callable[[], object]]:
    """Apply a candidate to a model, and yield what takes the next of ``steps`` late steps of a run.

    ``call`` is what the model takes besides the timestep.
    """
    device = "cpu" if model.device.type == "meta" else model.device  # on meta the numbers would be lost
    timesteps = torch.linspace(999, 0, (LATE + 1) * steps, device=device)[LATE * steps :]
    left = iter(timesteps)
    if is_transformer(model):
        with candidate.applied(SimpleNamespace(transformer=model)):
            yield lambda: model(**call | at_noise(model, call, float(next(left)) / 1000))
        return
    scheduler = SimpleNamespace(timesteps=timesteps)  # DeepCache looks the step up there
    with candidate.applied(SimpleNamespace(unet=model, scheduler=scheduler)):
        yield lambda: run_once(model, call, next(left))


@torch.no_grad()
def late_step_cost(model: Any, call: dict[str, Any], candidate: Candidate) -> float:
    """Return the cost of a step in which no schedule spares anything; of what works in cycles, the mean of a cycle.

    ``model`` and ``call`` are on the meta device, where nothing is computed.
    """

    def count(of: Candidate, steps: int) -> int:
        counter = flop_counter()
        with run_of_steps(model, call, of, steps) as step, sdpa_kernel(SDPBackend.MATH), counter:
            for _ in range(steps):
                step()
        return int(counter.get_total_flops())

    return count(candidate, candidate.cycle) / candidate.cycle / count(Dense(), 1)
