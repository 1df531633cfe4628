"""Which step a call of a transformer is, and what is remembered from one to the next."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import atedm
from atedm import Matched
from atedm.hosts.noise_steps import NoiseSteps
from atedm.method.matched import FIRST_STEP
from transformers_of import call_of, image_of, transformer

FLUX, SD3 = "FluxTransformer2DModel", "SD3Transformer2DModel"


def noise(value: float) -> Tensor:
    return torch.tensor([value])


def steps_of(located: list[Any]) -> list[int]:
    return [position.step for position, _ in located]


def test_steps_are_told_by_falling_noise_and_a_rise_begins_a_run() -> None:
    steps, text = NoiseSteps(), torch.zeros(1)
    found = [steps.locate(noise(n), lambda t: t, text)[0] for n in (1.0, 0.7, 0.7, 0.2, 1.0, 0.7)]
    assert [position.step for position in found] == [0, 1, 1, 2, 0, 1]
    assert [round(position.share, 3) for position in found] == [0, 0.3, 0.3, 0.8, 0, 0.3]


def test_elements_of_a_list_are_steps_by_their_place() -> None:
    steps, text, listed = NoiseSteps(), torch.zeros(1), torch.tensor([1000.0, 900.0, 400.0, 10.0])
    found = [steps.locate(t.expand(2), lambda t: t / 1000, text)[0] for t in [*listed, *listed]]
    assert [position.step for position in found] == [0, 1, 2, 3] * 2
    assert [position.share for position in found] == [0, 0.25, 0.5, 0.75] * 2


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "by value"])
def test_each_text_remembers_for_itself_and_for_the_next_step_only(listed: bool) -> None:
    values = torch.tensor([1.0, 0.8, 0.5, 0.1]) * (1000 if listed else 1)
    timesteps: list[Any] = list(values) if listed else [noise(float(v)) for v in values]
    to_noise = (lambda t: t / 1000) if listed else (lambda t: t)
    steps, texts = NoiseSteps(), (torch.zeros(1), torch.ones(1))
    for index, timestep in enumerate(timesteps):
        for which, text in enumerate(texts):
            _, context = steps.locate(timestep, to_noise, text)
            memory = context.memory_of("span")
            assert memory.last == (None if index == 0 else (index - 1, which))
            memory.store((index, which))
    _, context = steps.locate(timesteps[0], to_noise, texts[0])  # another run
    assert context.memory_of("span").last is None
    context.memory_of("span").store("first")
    steps.locate(timesteps[1], to_noise, texts[1])
    _, context = steps.locate(timesteps[2], to_noise, texts[0])  # a step of this text was left out
    assert context.memory_of("span").last is None


def test_two_images_that_share_a_text_find_nothing() -> None:
    steps, text = NoiseSteps(), torch.zeros(1)
    for value in (1.0, 0.6, 0.3):
        for _ in range(2):
            _, context = steps.locate(noise(value), lambda t: t, text)
            assert context.memory_of("span").last is None
            context.memory_of("span").store(value)


def test_texts_made_anew_in_every_step_do_not_pile_up() -> None:
    steps = NoiseSteps()
    texts = [torch.zeros(1) for _ in range(50)]
    for index, text in enumerate(texts):
        steps.locate(noise(1 - index / 50), lambda t: t, text)
    assert len(steps.contexts) <= 2


def run(model: Any, name: str, values: list[float], **changes: Any) -> list[Tensor]:
    call = call_of(name, **changes)
    timestep = call["timestep"]
    factor = 1000 if name == SD3 else 1
    return [image_of(model(**call | {"timestep": torch.full_like(timestep, factor * v)})) for v in values]


@pytest.mark.parametrize("name", [FLUX, SD3])
@torch.no_grad()
def test_the_first_step_is_dense_and_leaves_its_updates_behind(name: str) -> None:
    model = transformer(name)
    values = [1.0, 0.9989]
    dense = run(model, name, values)
    method = Matched(rate=0.5, dense_share=FIRST_STEP, own_update_share=1.0)
    with atedm.pruned(model, method):
        first = run(model, name, values)
    with atedm.pruned(model, method):
        (alone,) = run(model, name, values[1:])
    assert torch.equal(first[0], dense[0])
    assert not torch.equal(first[1], dense[1])
    # Little changes between the steps, so what each token was given in the dense one tells much of what it gets now.
    assert (first[1] - dense[1]).norm() < 0.8 * (alone - dense[1]).norm()


@torch.no_grad()
def test_guidance_in_two_calls_is_two_runs_side_by_side() -> None:
    method = Matched(rate=0.5)
    model = transformer(FLUX)
    calls = [call_of(FLUX, seed=0), call_of(FLUX, seed=1)]
    timesteps = [torch.full((2,), v) for v in (1.0, 0.6, 0.2)]
    apart = []
    for call in calls:
        alone = copy.deepcopy(model)
        atedm.apply(alone, method)
        apart.append([image_of(alone(**call | {"timestep": t})) for t in timesteps])
    atedm.apply(model, method)
    for index, timestep in enumerate(timesteps):
        for which, call in enumerate(calls):
            assert torch.equal(image_of(model(**call | {"timestep": timestep})), apart[which][index])
