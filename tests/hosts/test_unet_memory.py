"""What lasts from step to step: it serves the next step of the same run, and nothing else."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import atedm
from atedm.config import PRESETS, PruningConfig
from atedm.costs.counting import flop_counter
from atedm.costs.formula import BlockShape, block_macs, block_steps, mean_macs
from atedm.patching.memory import BlockMemory, Run
from atedm.patching.steps import step_position
from atedm.patching.summary import WORDS
from atedm.schedule import BlockPlace
from models import draw, inputs, run, sdxl_pipeline, sdxl_unet, small_unet, watched

MATCHED = PRESETS["matched"].replace(own_update_share=0.0)
REMEMBERING = {
    "refresh": PruningConfig(refresh_every=3),
    "refresh-whole-block": PruningConfig(refresh_every=3, reuse_place="before-self-attention"),
    "refresh-gradual": PruningConfig(refresh_every=4, gradual=((0, 0.3), (1, 0.4)), copy_map="first"),
    "refresh-weighted": PruningConfig(refresh_every=2, recovery="weighted-update", similarity="distance"),
    "matched-refresh": MATCHED.replace(refresh_every=3),
    "matched-rematch": MATCHED.replace(refresh_every=3, rematch=True),
    "matched-own": MATCHED.replace(own_update_share=0.6),
    "matched-last": MATCHED.replace(recovery="last-update", own_update_share=0.0, refresh_every=2),
}
remembering = pytest.mark.parametrize("config", REMEMBERING.values(), ids=REMEMBERING)


def listed(unet: Any, timesteps: Tensor, **changes: Any) -> list[Tensor]:
    """Call a U-Net with the same inputs once a step."""
    return [run(unet, t, **changes) for t in timesteps]


# --- which steps follow which -----------------------------------------------------------------------------------------


def followed(run: Run, *timesteps: Any) -> list[bool]:
    return [run.follows(t, step_position(t)) for t in timesteps]


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
        assert not Run().follows(one, step_position(one))
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
    memory, seen = BlockMemory(), Run()
    memory.choices = {0: None}  # type: ignore[dict-item]
    memory.reuses = memory.is_new = True
    followed(seen, *torch.linspace(999, 0, 3))
    for duplicate in (copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))):
        assert duplicate(memory) == BlockMemory()
        assert duplicate(seen) == Run()
    assert memory.choices
    assert seen.step == 2


# --- what a step goes by ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_choice_lasts_so_many_steps(every: int) -> None:
    unet = sdxl_unet()
    config = MATCHED.replace(refresh_every=every)  # whose lattice moves with every step
    seen: dict[int, Tensor] = {}
    with atedm.pruned(unet, config), atedm.observed(unet, lambda one: seen.update({one.step: one.keep})):
        listed(unet, torch.full((8,), 500))
    for step in range(1, 8):
        assert torch.equal(seen[step], seen[step - 1]) == (step % every != 0)


@pytest.mark.parametrize("changes", [{}, {"gradual": ((0, 0.3), (1, 0.4))}, {"ranking": "cross-attention-entropy"}])
def test_a_step_that_reuses_gives_what_choosing_again_would(changes: dict[str, Any]) -> None:
    unet = sdxl_unet()
    atedm.apply(unet, PruningConfig(schedule="constant", refresh_every=4, **changes))
    first, second, *_ = listed(unet, torch.full((4,), 500))
    assert torch.equal(first, second)  # same inputs, same choice
    other = run(unet, torch.full((4,), 500)[0], **inputs(unet, seed=5))
    fresh = sdxl_unet()
    atedm.apply(fresh, PruningConfig(schedule="constant", **changes))
    assert torch.equal(other, run(fresh, 500, **inputs(unet, seed=5)))
    # With other inputs the choice is that of the step before, and the rest is its own.
    steps = torch.full((4,), 500)
    run(unet, steps[0])
    reused = run(unet, steps[1], **inputs(unet, seed=5))
    assert not torch.allclose(reused, other, atol=1e-3)


@pytest.mark.parametrize("place", ["before-self-attention", "after-self-attention", "before-feed-forward"])
def test_steps_that_reuse_may_drop_tokens_elsewhere(place: str) -> None:
    """With a choice that does not depend on where it is made, it is as if the place were always that."""
    always = PruningConfig(ranking="uniform-random", recovery="direct-copy", place=place, schedule="constant")
    config = always.replace(place="after-feed-forward", refresh_every=5, reuse_place=place)
    unet, other = sdxl_unet(), sdxl_unet()
    atedm.apply(unet, config)
    atedm.apply(other, always.replace(refresh_every=5))
    steps = torch.full((5,), 500)
    mine, expected = listed(unet, steps), listed(other, steps)
    assert not torch.allclose(mine[0], expected[0], atol=1e-3)
    for a, b in zip(mine[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_a_kept_set_may_stay_while_matches_are_found_anew() -> None:
    """A lattice that stays is that of the first step, and who matches whom is settled by the features of this one."""
    config = MATCHED.replace(ranking="lattice", refresh_every=9, rematch=True)
    unet, other = sdxl_unet(), sdxl_unet()
    atedm.apply(unet, config)
    atedm.apply(other, config)
    steps = torch.full((5,), 500)
    run(unet, steps[0])
    expected = run(other, steps[0], **inputs(other, seed=5))  # the same lattice, and the same inputs
    assert torch.equal(run(unet, steps[1], **inputs(unet, seed=5)), expected)


def test_own_updates_are_those_of_the_last_step() -> None:
    """With all of them and the same inputs every step adds what the first one added."""
    unet = sdxl_unet()
    atedm.apply(unet, MATCHED.replace(recovery="last-update", own_update_share=0.0, refresh_every=9))
    first, *others = listed(unet, torch.full((5,), 500))
    for each in others:
        torch.testing.assert_close(each, first, rtol=1e-4, atol=1e-4)
    atedm.remove(unet)
    atedm.apply(unet, MATCHED.replace(own_update_share=0.7))  # a new choice each step: what differs lives on
    first, second, *_ = listed(unet, torch.full((5,), 500))
    atedm.remove(unet)
    atedm.apply(unet, MATCHED)
    assert torch.equal(first, run(unet, torch.full((5,), 500)[0]))
    assert not torch.allclose(second, run(unet, torch.full((5,), 500)[1]), atol=1e-3)


def test_of_a_block_that_was_left_alone_in_between_nothing_lives_on() -> None:
    """Spared in a step by the schedule, or not reached because the step broke off."""

    def spare_two(share: float) -> bool:
        return 1 / 6 <= share < 3 / 6

    steps = torch.full((6,), 500)
    unet = sdxl_unet()
    with atedm.pruned(unet, PRESETS["matched"].replace(schedule=spare_two)), lasting(unet) as seen:
        for index, step in enumerate(steps):
            run(unet, step, **inputs(unet, seed=index))
            spared = {name for name in unet._atedm.blocks if unet.get_submodule(name)._atedm.spared}
            forgotten = set(unet._atedm.blocks) if index == 0 else spared if spare_two((index - 1) / 6) else set()
            assert {name for name, lasts in seen.items() if not lasts} == forgotten, index
    assert spared
    with atedm.pruned(unet, "matched"), lasting(unet) as seen:
        run(unet, steps[0])
        hook = unet.mid_block.register_forward_hook(break_off)
        with pytest.raises(KeyboardInterrupt):
            run(unet, steps[1])
        hook.remove()
        run(unet, steps[2])
        up = {name for name in unet._atedm.blocks if name.startswith("up")}
        assert {name for name, lasts in seen.items() if not lasts} == up


def break_off(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def lasting(unet: UNet2DConditionModel) -> Iterator[dict[str, bool]]:
    """Whether each block remembers updates when it is called."""
    seen: dict[str, bool] = {}

    def look(block: Any, _: Any, *, name: str) -> None:
        seen[name] = block._atedm.memory.updates.last is not None

    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(partial(look, name=name)) for name in unet._atedm.blocks
    ]
    yield seen
    for hook in hooks:
        hook.remove()


# --- nothing leaks ----------------------------------------------------------------------------------------------------


@remembering
def test_an_image_is_what_it_is_on_a_fresh_pipeline(config: PruningConfig) -> None:
    def fresh(seed: int, **changes: Any) -> Tensor:
        pipe = sdxl_pipeline(small_unet())
        atedm.apply(pipe, config)
        return draw(pipe, seed, **changes)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise RuntimeError("stopped")
        return values

    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, config)
    assert torch.equal(draw(pipe, 0), fresh(0))
    assert torch.equal(draw(pipe, 1), fresh(1))
    with pytest.raises(RuntimeError, match="stopped"):
        draw(pipe, 2, callback_on_step_end=stop)
    assert torch.equal(draw(pipe, 1), fresh(1))
    assert torch.equal(draw(pipe, 0, height=32), fresh(0, height=32))
    assert torch.equal(draw(pipe, 0, prompt=["a red circle"] * 3), fresh(0, prompt=["a red circle"] * 3))
    assert torch.equal(draw(pipe, 0, guidance_scale=1.0), fresh(0, guidance_scale=1.0))
    assert torch.equal(draw(pipe, 3), fresh(3))


@remembering
def test_images_in_turns_are_what_they_are_alone(config: PruningConfig) -> None:
    steps, other_steps = torch.linspace(999, 0, 6), torch.linspace(999, 0, 6)
    unet = small_unet()
    a, b = inputs(unet, seed=1), inputs(unet, seed=2)

    def alone(call: dict[str, Any]) -> list[Tensor]:
        """Each step on its own: what a step gives that nothing came before."""
        fresh = small_unet()
        atedm.apply(fresh, config)
        return [run(fresh, torch.linspace(999, 0, 6)[i], **call) for i in range(6)]

    atedm.apply(unet, config)
    expected_a, expected_b = alone(a), alone(b)
    for lists in ((steps, steps), (steps, other_steps)):
        for i in range(6):
            assert torch.equal(run(unet, lists[0][i], **a), expected_a[i])
            assert torch.equal(run(unet, lists[1][i], **b), expected_b[i])


@remembering
def test_a_batch_that_shrinks_on_the_way_is_chosen_for_anew(config: PruningConfig) -> None:
    def end_guidance(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
                values[name] = values[name].chunk(2)[-1]
        return values

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, config)
    with watched(pipe.unet) as calls:
        image = draw(pipe, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names)
    assert torch.isfinite(image).all()
    assert [call.importance["mid_block.attentions.0"].shape[0] for call in calls] == [2, 2, 1, 1]


@remembering
def test_a_copy_in_the_middle_of_a_run_starts_with_nothing(config: PruningConfig) -> None:
    unet = small_unet()
    atedm.apply(unet, config)
    steps = torch.linspace(999, 0, 6)
    run(unet, steps[0])
    copies = [copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]
    following = run(unet, steps[1], **inputs(unet, seed=3))
    fresh = small_unet()
    atedm.apply(fresh, config)
    expected = run(fresh, steps[1], **inputs(unet, seed=3))
    assert not torch.allclose(following, expected, atol=1e-4)
    for each in copies:
        assert torch.equal(run(each, steps[1], **inputs(unet, seed=3)), expected)


def test_what_is_not_asked_for_is_not_remembered() -> None:
    unet = small_unet()
    atedm.apply(unet, MATCHED)
    listed(unet, torch.linspace(999, 0, 4))
    assert unet._atedm.run == Run()
    assert all(unet.get_submodule(name)._atedm.memory == BlockMemory() for name in unet._atedm.blocks)


@remembering
def test_the_summary_says_what_a_normal_step_saves_whatever_is_remembered(config: PruningConfig) -> None:
    forgetful = config.replace(refresh_every=1, reuse_place=None, rematch=False)
    mine, expected = (atedm.apply(sdxl_unet(), one) for one in (config, forgetful))
    assert mine.saving == expected.saving
    assert mine.prunable == expected.prunable
    assert str(mine).startswith("attention block")


def test_rates_that_leave_as_many_tokens_are_one_choice() -> None:
    """Of 6 tokens both rates leave 4, so the step at which the schedule changes over goes by the choice made before."""
    config = MATCHED.replace(
        pruning_rate=0.4, level_factors=(), prune_less_factor=0.9, schedule="prune-less-early", refresh_every=100
    )
    shape = BlockShape(BlockPlace("mid", 2, 0, 1, 2, "mid_block.attentions.0"), (2, 3), 8, 7, 8)
    assert config.tokens_left(shape.place, 6) == config.tokens_left(shape.place, 6, prune_less=True) == {0: 4}
    steps = block_steps(shape, config, False, 10)
    assert sum(n for kind, n in steps.items() if not kind.reuses) == 1


def test_no_gradient_lives_on_in_what_is_remembered() -> None:
    unet = small_unet()
    atedm.apply(unet, MATCHED.replace(own_update_share=0.5, refresh_every=2))
    call = inputs(unet)
    for t in torch.linspace(999, 0, 3):
        out = unet(**call, timestep=t).sample
    memories = [unet.get_submodule(name)._atedm.memory for name in unet._atedm.blocks]
    assert memories
    for memory in memories:
        assert memory.updates.last is not None
        assert not memory.updates.last.requires_grad
        assert not any(x.requires_grad for x in memory.choices[0] if x is not None)
    out.sum().backward()  # through the last step alone
    assert unet.conv_in.weight.grad is not None


# --- other rates ------------------------------------------------------------------------------------------------------


def test_levels_may_have_factors() -> None:
    unet = sdxl_unet()
    with atedm.pruned(unet, PruningConfig(pruning_rate=0.5, level_factors=((2, 0.5), (3, 1.0)))) as summary:
        assert {(s.place.level, summary.kept(s)) for s in summary.shapes} == {(2, 48), (3, 8)}
        with watched(unet) as calls:
            run(unet)
    assert calls[0].kept == {s.place.name: summary.kept(s) for s in summary.shapes}


def test_a_step_may_prune_less_everywhere() -> None:
    unet = sdxl_unet()
    with atedm.pruned(unet, PruningConfig(pruning_rate=0.5, prune_less_factor=0.5)) as summary:
        assert summary.spared == frozenset()
        with watched(unet) as calls:
            listed(unet, torch.linspace(999, 0, 10)[[0, 1]])
            steps = torch.linspace(999, 0, 10)
            for i in (2, 3, 9):
                run(unet, steps[i])
    assert {call.kept["mid_block.attentions.0"] for call in calls[:1]} == {12}
    assert [call.kept["mid_block.attentions.0"] for call in calls[-3:]] == [12, 8, 8]


# --- what it costs ----------------------------------------------------------------------------------------------------

COSTS = {
    **REMEMBERING,
    "levels": PruningConfig(level_factors=((2, 0.4),)),
    "less-everywhere": PruningConfig(prune_less_factor=0.5, refresh_every=4),
    "mirrored": MATCHED.replace(schedule="prune-more-early", refresh_every=4, prune_less_factor=0.5),
}


@pytest.mark.parametrize("config", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("steps", [1, 10])
def test_the_mean_over_a_run_is_what_torch_counts(config: PruningConfig, steps: int) -> None:
    unet = sdxl_unet()
    call = inputs(unet, batch=1, words=WORDS)

    def counted(timesteps: Tensor) -> list[int]:
        macs = []
        for t in timesteps:
            with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                unet(**call, timestep=t)
            macs.append(counter.get_total_flops() // 2)
        return macs

    (dense,) = counted(torch.linspace(999, 0, 2)[:1])
    with atedm.pruned(unet, config) as summary:
        # A list of one has no place in a run, so it is judged by its value.
        pruned = counted(torch.linspace(999, 0, steps))
    whole = sum(block_macs(shape).exact for shape in summary.shapes)
    mean = mean_macs(summary.shapes, config, summary.pruned, steps)
    assert sum(pruned) / steps == pytest.approx(dense - whole + mean, rel=1e-12)
    assert mean < whole or config.needs_attention_map


@settings(deadline=None, max_examples=12)
@given(
    every=st.integers(1, 12),
    steps=st.integers(1, 40),
    schedule=st.sampled_from(["prune-less-early", "prune-more-early", "constant"]),
    factor=st.sampled_from([None, 0.0, 0.5, 1.0]),
    share=st.floats(0, 1),
)
def test_the_cost_report_adds_up_over_the_run(
    every: int, steps: int, schedule: str, factor: float | None, share: float
) -> None:
    unet = SMALL()
    config = MATCHED.replace(refresh_every=every, schedule=schedule, prune_less_factor=factor, prune_less_share=share)
    report = atedm.cost(unet, config, size=(128, 128), steps=steps, guidance=False)
    figures = report.figures()
    assert figures.mean <= figures.dense
    if every == 1:
        early = report.prune_less_steps / steps
        expected = early * figures.prune_less_step + (1 - early) * figures.normal_step
        assert figures.mean == pytest.approx(expected, rel=1e-12)
    shapes = [block.shape for block in report.blocks]
    names = frozenset(shape.place.name for shape in shapes)
    assert figures.mean == pytest.approx(report.rest + mean_macs(shapes, config, names, steps), rel=1e-12)


def _cached(build: Callable[[], UNet2DConditionModel]) -> Callable[[], UNet2DConditionModel]:
    built: list[UNet2DConditionModel] = []

    def get() -> UNet2DConditionModel:
        if not built:
            built.append(build())
        return built[0]

    return get


SMALL = _cached(small_unet)
