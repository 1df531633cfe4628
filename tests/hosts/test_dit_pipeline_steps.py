"""Steps of a run are those of the pipeline's scheduler, also where a transformer is handed a number made of one."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import atedm
from atedm import Matched
from atedm.hosts.noise_steps import NoiseSteps
from atedm.hosts.pipeline_schedule import PipelineSchedule
from transformer_support import TRANSFORMERS, Made

HALF = Matched(rate=0.5, dense_share=0.3)
PIPELINES = {name: make for name, make, _ in TRANSFORMERS}


def pruned_steps(made: Made, **changes: object) -> list[int]:
    pipe, draw = made
    seen: set[int] = set()
    with atedm.pruned(pipe, HALF), atedm.observed(pipe, lambda one: seen.add(one.step)):
        draw(**changes)
    return sorted(seen)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_first_steps_of_the_list_are_dense_however_the_noise_falls(make: Callable[[], Made]) -> None:
    pipe, draw = make()
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):  # most of its steps have more than 70 % noise
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    assert pruned_steps((pipe, draw), num_inference_steps=8) == [3, 4, 5, 6, 7]


def located(steps: NoiseSteps, noises: list[float]) -> list[int]:
    text = torch.zeros(1)
    return [steps.locate(torch.tensor([noise]), lambda t: t, text)[0].step for noise in noises]


class Pipe:
    def __init__(self, noises: list[float]) -> None:
        self.scheduler = SimpleNamespace(timesteps=1000 * torch.tensor(noises))


def test_a_step_that_rounds_to_its_neighbour_is_the_next_one() -> None:
    pipe = Pipe([1.0, 0.997, 0.995, 0.5])
    assert located(NoiseSteps(PipelineSchedule(pipe)), [1.0, 0.9985, 0.9961, 0.5]) == [0, 1, 2, 3]


def test_a_run_by_another_scheduler_is_told_by_its_noise_to_its_end() -> None:
    pipe = Pipe([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    steps = NoiseSteps(PipelineSchedule(pipe))
    assert located(steps, [1.0, 0.77, 0.6, 0.5]) == [0, 1, 2, 3]
    assert located(steps, [1.0, 0.8, 0.6]) == [0, 2, 4]  # a new run has its list again


def test_the_last_scheduler_is_known_when_the_pipeline_is_gone_and_a_copy_knows_none() -> None:
    pipe = Pipe([1.0, 0.9, 0.8, 0.7])
    steps = NoiseSteps(PipelineSchedule(pipe))
    assert located(steps, [1.0, 0.8]) == [0, 2]
    del pipe
    assert located(steps, [1.0, 0.8]) == [0, 2]
    assert located(copy.deepcopy(steps), [1.0, 0.8]) == [0, 1]
    assert located(NoiseSteps(PipelineSchedule(object())), [1.0, 0.8]) == [0, 1]
