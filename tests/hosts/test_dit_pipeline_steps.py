"""Steps of a run are those of the pipeline's scheduler, also where a transformer is handed a number made of one."""

from collections.abc import Callable

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import atedm
from atedm import Matched
from transformer_support import TRANSFORMERS, Made

HALF = Matched(rate=0.5, dense_share=0.3)
IMAGES = {name: make for name, make, _ in TRANSFORMERS if name not in ("ControlNet of SD3",)}


def pruned_steps(made: Made, **changes: object) -> list[int]:
    pipe, draw = made
    seen: set[int] = set()
    with atedm.pruned(pipe, HALF), atedm.observed(pipe, lambda one: seen.add(one.step)):
        draw(**changes)
    return sorted(seen)


@pytest.mark.parametrize("make", IMAGES.values(), ids=IMAGES)
def test_the_first_steps_of_the_list_are_dense_however_the_noise_falls(make: Callable[[], Made]) -> None:
    pipe, draw = make()
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):  # most of its steps have more than 70 % noise
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    assert pruned_steps((pipe, draw), num_inference_steps=8) == [3, 4, 5, 6, 7]
