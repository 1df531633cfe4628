"""What lasts from step to step: it serves the next step of the same run, and nothing else."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import atedm
from atedm import AtEdm, Early, Matched
from atedm.hosts.runs import Run
from atedm.lab.ablation import Variant
from atedm.method.contract import Memory, Method
from models import draw, inputs, run, sdxl_pipeline, sdxl_unet, small_unet, watched

REMEMBERING = {"updates": Matched(own_update_share=0.6), "choices": Variant(refresh_every=3)}
remembering = pytest.mark.parametrize("method", REMEMBERING.values(), ids=REMEMBERING)
FORGETS = Matched(own_update_share=0.0)


def listed(unet: Any, timesteps: Tensor, **changes: Any) -> list[Tensor]:
    """Call a U-Net with the same inputs once a step."""
    return [run(unet, t, **changes) for t in timesteps]


# --- which steps follow which -----------------------------------------------------------------------------------------


def followed(run: Run, *timesteps: Any) -> list[bool]:
    return [run.locate(t)[1] for t in timesteps]


def test_the_next_step_of_a_list_follows_and_no_other() -> None:
    a, b = torch.linspace(999, 0, 6), torch.linspace(999, 0, 6)
    assert followed(Run(), *a) == [False, True, True, True, True, True]
    assert followed(Run(), *a[3:]) == [False, True, True]  # image to image
    assert followed(Run(), a[0], a[1], a[3], a[4]) == [False, True, False, True]  # one left out
    assert followed(Run(), a[0], a[1], a[0], a[1]) == [False, True, False, True]  # the next image, same list
    assert followed(Run(), a[0], b[0], a[1], b[1]) == [False] * 4  # two runs in turns
    assert followed(Run(), a[0], b[1], b[2]) == [False, False, True]
    assert followed(Run(), a[0], a[1].expand(4), a[2][None]) == [False, True, True]


def test_of_a_step_that_comes_twice_nothing_follows_until_a_new_run() -> None:
    a = torch.linspace(999, 0, 4)
    twice = [t for t in a for _ in range(2)]
    assert followed(Run(), *twice) == [False] * 8
    assert followed(Run(), *twice, a[0], a[1], a[2]) == [False] * 9 + [True, True]


@pytest.mark.parametrize(
    "timestep", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.empty(3, device="meta")]
)
def test_what_is_no_step_of_a_list_follows_nothing(timestep: Any) -> None:
    one = timestep[0] if isinstance(timestep, Tensor) and timestep.ndim else timestep
    if isinstance(one, Tensor) and one.device.type == "meta":
        assert not Run().locate(one)[1]
        return
    a = torch.linspace(999, 0, 4)
    assert followed(Run(), one, one, a[0], one, a[1]) == [False] * 5


def test_a_list_at_the_same_address_as_one_before_is_another() -> None:
    seen = Run()
    address = set()
    for _ in range(20):
        a = torch.linspace(999, 0, 4)
        address.add(a.data_ptr())
        assert followed(seen, a[0]) == [False]
        b = a.clone()
        del a  # the run holds on to it, so its place is not free
        assert followed(seen, b[1]) == [False]
        address.add(b.data_ptr())
    assert len(address) > 1


def test_a_copy_remembers_nothing() -> None:
    memory, seen = Memory(), Run()
    memory.store(torch.ones(1))
    followed(seen, *torch.linspace(999, 0, 3))
    for duplicate in (copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
        assert duplicate(memory) == Memory()
        assert duplicate(seen) == Run()
    assert memory.last is not None
    assert seen.step == 2


# --- what a step goes by ----------------------------------------------------------------------------------------------


def test_updates_of_the_last_step_are_added() -> None:
    unet = sdxl_unet()
    steps = torch.full((5,), 500)
    with atedm.pruned(unet, Matched(own_update_share=0.7)):
        first, second, *_ = listed(unet, steps)
    with atedm.pruned(unet, FORGETS):
        plain = listed(unet, steps[:2])
    assert torch.equal(first, plain[0])  # there is nothing yet to remember
    assert not torch.allclose(second, plain[1], atol=1e-3)


def test_what_a_method_stores_is_what_it_finds_in_the_next_step_of_the_run() -> None:
    found: dict[str, list[Any]] = {}

    class Counts(Matched):
        def drop(self, view: atedm.View) -> atedm.Cut:
            assert view.memory is not None
            last = view.memory.last
            found.setdefault(view.place.name, []).append(last)
            view.memory.store((last or 0) + 1)
            return Matched(own_update_share=0.0).drop(view)

    unet = small_unet()
    steps = torch.linspace(999, 0, 6)
    with atedm.pruned(unet, Counts()):
        listed(unet, steps[:3])  # three of a run
        listed(unet, steps[[0, 1]])  # copies of two, of another list
        run(unet, 500)  # a step of its own
    assert list(found.values()) == 2 * [[None, 1, 2, None, 1, None]]


def test_of_a_block_that_was_left_alone_in_between_nothing_lives_on() -> None:
    """Spared in a step by the schedule, or not reached because the step broke off."""

    class Spares(Matched):
        def is_early(self, share: float) -> bool:
            return 1 / 6 <= share < 3 / 6

        def count(self, place: atedm.Place, tokens: int, *, early: bool = False) -> int:
            return tokens if early and Early().spares(place) else super().count(place, tokens)

    steps = torch.full((6,), 500)
    unet = sdxl_unet()
    method = Spares(own_update_share=0.5)
    with atedm.pruned(unet, method) as summary, lasting(unet) as seen:
        for index, step in enumerate(steps):
            run(unet, step, **inputs(unet, seed=index))
            forgotten = summary.pruned if index == 0 else summary.spared if index - 1 in (1, 2) else frozenset()
            assert {name for name, lasts in seen.items() if not lasts} == forgotten, index
    assert len(summary.spared) == 4
    with atedm.pruned(unet, "matched"), lasting(unet) as seen:
        run(unet, steps[0])
        hook = unet.mid_block.register_forward_hook(break_off)
        with pytest.raises(KeyboardInterrupt):
            run(unet, steps[1])
        hook.remove()
        run(unet, steps[2])
        up = {name for name in unet._atedm.spans if name.startswith("up")}
        assert {name for name, lasts in seen.items() if not lasts} == up


def break_off(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def lasting(unet: UNet2DConditionModel) -> Iterator[dict[str, bool]]:
    """Whether each block remembers updates when it is called."""
    seen: dict[str, bool] = {}

    def look(block: Any, _: Any, *, name: str) -> None:
        seen[name] = block._atedm.memory.last is not None

    hooks = [unet.get_submodule(name).register_forward_pre_hook(partial(look, name=name)) for name in unet._atedm.spans]
    yield seen
    for hook in hooks:
        hook.remove()


# --- nothing leaks ----------------------------------------------------------------------------------------------------


@remembering
def test_an_image_is_what_it_is_on_a_fresh_pipeline(method: Method) -> None:
    def fresh(seed: int, **changes: Any) -> Tensor:
        pipe = sdxl_pipeline(small_unet())
        atedm.apply(pipe, method)
        return draw(pipe, seed, **changes)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise RuntimeError("stopped")
        return values

    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, method)
    assert torch.equal(draw(pipe, 0), fresh(0))
    assert torch.equal(draw(pipe, 1), fresh(1))
    with pytest.raises(RuntimeError, match="stopped"):
        draw(pipe, 2, callback_on_step_end=stop)
    assert torch.equal(draw(pipe, 1), fresh(1))
    assert torch.equal(draw(pipe, 0, height=32), fresh(0, height=32))
    assert torch.equal(draw(pipe, 0, prompt=["a duck"] * 3), fresh(0, prompt=["a duck"] * 3))
    assert torch.equal(draw(pipe, 0, guidance_scale=1.0), fresh(0, guidance_scale=1.0))
    assert torch.equal(draw(pipe, 3), fresh(3))


@remembering
def test_images_in_turns_are_what_they_are_alone(method: Method) -> None:
    steps, other_steps = torch.linspace(999, 0, 6), torch.linspace(999, 0, 6)
    unet = small_unet()
    a, b = inputs(unet, seed=1), inputs(unet, seed=2)

    def alone(call: dict[str, Any]) -> list[Tensor]:
        """Each step on its own: what a step gives that nothing came before."""
        fresh = small_unet()
        atedm.apply(fresh, method)
        return [run(fresh, torch.linspace(999, 0, 6)[i], **call) for i in range(6)]

    atedm.apply(unet, method)
    expected_a, expected_b = alone(a), alone(b)
    for lists in ((steps, steps), (steps, other_steps)):
        for i in range(6):
            assert torch.equal(run(unet, lists[0][i], **a), expected_a[i])
            assert torch.equal(run(unet, lists[1][i], **b), expected_b[i])


@remembering
def test_a_batch_that_shrinks_on_the_way_is_chosen_for_anew(method: Method) -> None:
    def end_guidance(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
                values[name] = values[name].chunk(2)[-1]
        return values

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, method)
    with watched(pipe.unet) as calls:
        image = draw(pipe, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names)
    assert torch.isfinite(image).all()
    assert [call.importance["mid_block.attentions.0"].shape[0] for call in calls] == [2, 2, 1, 1]


@remembering
def test_a_copy_in_the_middle_of_a_run_starts_with_nothing(method: Method) -> None:
    unet = small_unet()
    atedm.apply(unet, method)
    steps = torch.linspace(999, 0, 6)
    run(unet, steps[0])
    copies = [copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]
    following = run(unet, steps[1], **inputs(unet, seed=3))
    fresh = small_unet()
    atedm.apply(fresh, method)
    expected = run(fresh, steps[1], **inputs(unet, seed=3))
    assert not torch.allclose(following, expected, atol=1e-4)
    for each in copies:
        assert torch.equal(run(each, steps[1], **inputs(unet, seed=3)), expected)


def test_what_is_not_asked_for_is_not_remembered() -> None:
    for method in (FORGETS, AtEdm()):
        unet = small_unet()
        with atedm.pruned(unet, method):
            listed(unet, torch.linspace(999, 0, 4))
            assert all(unet.get_submodule(name)._atedm.memory == Memory() for name in unet._atedm.spans)


def test_no_gradient_lives_on_in_what_is_remembered() -> None:
    unet = small_unet()
    atedm.apply(unet)
    call = inputs(unet)
    for t in torch.linspace(999, 0, 3):
        out = unet(**call, timestep=t).sample
    memories = [unet.get_submodule(name)._atedm.memory for name in unet._atedm.spans]
    assert memories
    assert not any(memory.last.requires_grad for memory in memories)
    out.sum().backward()  # through the last step alone
    assert unet.conv_in.weight.grad is not None
