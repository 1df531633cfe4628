"""Switching on and off: what `apply` and its kin do to a model, and that they undo it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

import atedm
from atedm import METHODS, AtEdm, Matched, Place
from models import EARLY, LATE, draw, run, sd1_unet, sdxl_pipeline, sdxl_unet, small_unet, snapshot, watched

SPARED_F_L = {
    "down_blocks.1.attentions.0",
    "down_blocks.2.attentions.0",
    "up_blocks.0.attentions.2",
    "up_blocks.1.attentions.2",
}


class Interruption(Exception):
    pass


# --- apply ------------------------------------------------------------------------------------------------------------


def test_apply_to_a_pipeline_and_to_its_unet_is_the_same() -> None:
    pipe, unet = sdxl_pipeline(small_unet()), small_unet()
    by_pipe, by_unet = atedm.apply(pipe), atedm.apply(unet)
    assert (by_pipe.method, by_pipe.pruned) == (by_unet.method, by_unet.pruned)
    assert [by_pipe.kept(shape) for shape in by_pipe.shapes] == [by_unet.kept(shape) for shape in by_unet.shapes]
    assert atedm.is_applied(pipe)
    assert atedm.is_applied(pipe.unet)
    assert torch.equal(run(pipe.unet), run(unet))
    atedm.remove(pipe.unet)
    assert not atedm.is_applied(pipe)


def test_without_a_name_it_is_the_method_that_the_figures_support_whatever_the_model() -> None:
    pipe = sdxl_pipeline(small_unet())
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert atedm.apply(pipe).method == Matched()
    assert atedm.apply(sd1_unet()).method == Matched()
    turbo = sdxl_unet()
    turbo.register_to_config(_name_or_path="somewhere/sdxl-turbo")
    assert atedm.apply(turbo).method == Matched()


@pytest.mark.parametrize("name", METHODS)
def test_apply_takes_a_method_by_name(name: str) -> None:
    by_name, itself = sdxl_unet(), sdxl_unet()
    assert atedm.apply(by_name, name).method is atedm.apply(itself, METHODS[name]).method
    for timestep in (EARLY, LATE):
        assert torch.equal(run(by_name, timestep), run(itself, timestep))


def test_the_methods_differ() -> None:
    outputs = []
    for name in METHODS:
        unet = sdxl_unet()
        atedm.apply(unet, name)
        outputs.append(run(unet, EARLY))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_apply_changes_no_weight_and_makes_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sdxl_unet()
    before = {name: (id(value), value.clone()) for name, value in unet.state_dict(keep_vars=True).items()}
    monkeypatch.setattr(UNet2DConditionModel, "forward", None)
    atedm.apply(unet)
    after = unet.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(id(after[name]) == old and torch.equal(after[name], value) for name, (old, value) in before.items())


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_pruning_shows_in_the_output(method: str) -> None:
    unet = sdxl_unet()
    dense_early, dense_late = run(unet, EARLY), run(unet, LATE)
    atedm.apply(unet, method)
    assert (run(unet, EARLY) - dense_early).std() > 0.3 * dense_early.std()
    assert (run(unet, LATE) - dense_late).std() > 0.3 * dense_late.std()


# --- the summary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS.values(), AtEdm(0.9), Matched(0.1)], ids=lambda m: f"{m.name}-{m.rate}")
@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_the_summary_says_what_really_runs(method: Any, size: tuple[int, int]) -> None:
    unet = sdxl_unet(sample_size=size)
    summary = atedm.apply(unet, method)
    shapes = {shape.place.name: shape for shape in summary.shapes}
    seen: list[atedm.Observation] = []
    with atedm.observed(unet, seen.append), watched(unet) as calls:
        run(unet, EARLY, size=size)
        run(unet, LATE, size=size)
    early, late = calls
    assert late.kept.keys() == summary.pruned
    assert early.kept.keys() == summary.pruned - summary.spared
    for name in late.kept:
        assert late.kept[name] == summary.kept(shapes[name])
        assert early.kept.get(name, shapes[name].tokens) == summary.kept(shapes[name], early=True)
    for one in seen:
        assert one.size == shapes[one.block].size
        assert one.importance.shape[1] == shapes[one.block].tokens
        assert one.layer == method.dense_layers


def test_the_summary_prints_blocks_kept_tokens_and_the_cost() -> None:
    summary = atedm.apply(sdxl_unet(), "dagger")
    assert summary.cost() < 1
    header, *rows, what, cost = str(summary).splitlines()
    assert header.split() == ["attention", "block", "level", "layers", "tokens", "kept", "spared"]
    assert [row.split() for row in rows] == [
        ["down_blocks.1.attentions.0", "2", "2", "64", "all"],
        ["down_blocks.1.attentions.1", "2", "2", "64", "all"],
        ["down_blocks.2.attentions.0", "3", "3", "16", "6", "early"],
        ["down_blocks.2.attentions.1", "3", "3", "16", "6"],
        ["mid_block.attentions.0", "3", "3", "16", "6"],
        ["up_blocks.0.attentions.0", "3", "3", "16", "6"],
        ["up_blocks.0.attentions.1", "3", "3", "16", "6"],
        ["up_blocks.0.attentions.2", "3", "3", "16", "6", "early"],
        ["up_blocks.1.attentions.0", "2", "2", "64", "all"],
        ["up_blocks.1.attentions.1", "2", "2", "64", "all"],
        ["up_blocks.1.attentions.2", "2", "2", "64", "all"],
    ]
    assert what == "AT-EDM†: 6 of 11 blocks are pruned."
    assert cost == f"A run of 50 steps costs {summary.cost():.1%} of the dense arithmetic."


def test_the_summary_says_when_pruning_costs_more_than_it_saves() -> None:
    assert "costs more than it saves" in str(atedm.apply(sdxl_unet(), AtEdm(0.1)))
    summary = atedm.apply(sdxl_unet(), Matched(0.9))
    assert summary.cost() < 1
    assert "costs more" not in str(summary)


def test_the_summary_of_a_method_that_spares_nothing_says_so() -> None:
    for method in ("turbo", "matched"):
        summary = atedm.apply(sdxl_unet(), method)
        assert summary.spared == frozenset()
        assert "early" not in str(summary)


# --- where ------------------------------------------------------------------------------------------------------------


def test_where_as_a_predicate_is_asked_of_every_block() -> None:
    asked: list[Place] = []

    def only_up(block: Place) -> bool:
        asked.append(block)
        return block.stage == "up" and block.level == 3

    unet = sdxl_unet()
    summary = atedm.apply(unet, AtEdm(where=only_up))
    assert list(dict.fromkeys(asked)) == [shape.place for shape in summary.shapes]
    with watched(unet) as calls:
        run(unet)
    assert calls[0].kept.keys() == {f"up_blocks.0.attentions.{index}" for index in range(3)}
    for place in asked:
        assert unet.get_submodule(place.name) is not None
        assert place.layers == {2: 2, 3: 3}[place.level]
        assert place.count == {"down": 2, "mid": 1, "up": 3}[place.stage]


def test_first_and_last_are_counted_among_all_blocks_of_a_stage_pruned_or_not() -> None:
    summary = atedm.apply(sdxl_unet(), AtEdm(where=lambda place: place.index == 1))
    assert summary.spared == frozenset()
    assert atedm.apply(sdxl_unet(), "paper").spared == SPARED_F_L


@pytest.mark.parametrize("method", ["dagger", "turbo"])
def test_dagger_prunes_no_block_of_the_second_level(method: str) -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, method)
    level = {shape.place.name: shape.place.level for shape in summary.shapes}
    with watched(unet) as calls:
        run(unet, LATE)
    assert calls[0].kept.keys() == {name for name in level if level[name] != 2} == summary.pruned


# --- exactly as before ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AtEdm(0.0), Matched(0.0)])
def test_at_rate_zero_the_image_is_bit_identical(method: Any) -> None:
    pipe = sdxl_pipeline(small_unet())
    dense = draw(pipe, output_type="pt")
    atedm.apply(pipe, method)
    assert torch.equal(draw(pipe, output_type="pt"), dense)


@pytest.mark.parametrize("method", [AtEdm(1 / 65), Matched(1 / 65)])
def test_at_a_rate_that_drops_no_token_the_output_is_bit_identical(method: Any) -> None:
    unet = sdxl_unet()
    dense = run(unet)
    atedm.apply(unet, method)
    assert torch.equal(run(unet), dense)


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_remove_restores_the_image_and_every_attribute(method: str) -> None:
    pipe = sdxl_pipeline(small_unet())
    before, dense = snapshot(pipe.unet), draw(pipe)
    atedm.apply(pipe, method)
    assert snapshot(pipe.unet) != before
    pruned = draw(pipe)
    atedm.remove(pipe)
    assert snapshot(pipe.unet) == before
    assert torch.equal(draw(pipe), dense)
    assert not torch.equal(pruned, dense)


def test_it_can_be_applied_and_removed_again_and_again() -> None:
    unet = sdxl_unet()
    dense = run(unet)
    outputs = []
    for config in ("paper", "matched", "paper"):
        with atedm.pruned(unet, config):
            outputs.append(run(unet, EARLY))
        assert torch.equal(run(unet), dense)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_an_exception_in_the_middle_of_an_image_leaves_the_model_as_before() -> None:
    pipe = sdxl_pipeline(small_unet())
    before, dense = snapshot(pipe.unet), draw(pipe)

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 1:
            raise Interruption
        return kwargs

    with pytest.raises(Interruption), atedm.pruned(pipe):
        draw(pipe, callback_on_step_end=interrupt)
    assert snapshot(pipe.unet) == before
    assert torch.equal(draw(pipe), dense)


def test_pruned_gives_the_summary() -> None:
    unet = small_unet()
    with atedm.pruned(unet, AtEdm(0.5)) as summary:
        assert atedm.is_applied(unet)
    assert not atedm.is_applied(unet)
    assert summary == atedm.apply(unet, AtEdm(0.5))


def test_pruned_removes_from_the_unet_it_was_applied_to() -> None:
    pipe = sdxl_pipeline(small_unet())
    unet = pipe.unet
    with atedm.pruned(pipe):
        pipe.unet = small_unet()
    assert not atedm.is_applied(unet)


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_equal_seeds_give_equal_images_twice_in_a_row(method: str) -> None:
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, method)
    first = draw(pipe, seed=3)
    assert torch.equal(draw(pipe, seed=3), first)
    assert not torch.equal(draw(pipe, seed=4), first)


# --- observed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_observers_see_the_kept_tokens_and_only_inside_the_block(method: str) -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, method)
    counts = {shape.place.name: summary.kept(shape) for shape in summary.shapes}
    seen: list[atedm.Observation] = []
    unwatched = run(unet)
    with atedm.observed(unet, seen.append):
        assert torch.equal(run(unet), unwatched)
    assert [one.block for one in seen] == list(counts)
    for one in seen:
        assert (len(one.importance), one.importance.dtype) == (2, torch.float32)
        order = one.importance.argsort(dim=-1, descending=True, stable=True)[:, : counts[one.block]]
        assert torch.equal(one.keep, order.sort(dim=-1).values)
    run(unet)
    assert len(seen) == 11


def test_an_observer_is_taken_off_after_an_exception() -> None:
    unet = sdxl_unet()
    atedm.apply(unet)

    def interrupt(_: Any) -> None:
        raise Interruption

    with pytest.raises(Interruption), atedm.observed(unet, interrupt):
        run(unet)
    run(unet)


def test_nothing_can_be_observed_or_removed_where_nothing_was_applied() -> None:
    unet = sdxl_unet()
    with pytest.raises(ValueError, match=r"not patched.*nothing to observe; call atedm\.apply"):
        atedm.observed(unet, print).__enter__()
    with pytest.raises(ValueError, match="not patched, so there is nothing to remove"):
        atedm.remove(unet)


def test_a_recording_has_the_cuts_of_a_run_on_the_cpu() -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, "paper")
    with atedm.recorded(unet) as recording:
        for timestep in torch.linspace(999, 0, 10):
            run(unet, timestep)
    assert recording.evaluations == 10
    assert recording.kept_share == pytest.approx(summary.kept_share(10))
    assert len(recording.observations) == 3 * 7 + 7 * 11
    assert {one.keep.device.type for one in recording.observations} == {"cpu"}
    with atedm.recorded(unet) as nothing:
        pass
    with pytest.raises(ValueError, match="nothing was recorded"):
        nothing.kept_share  # noqa: B018


# --- SD 1.x -----------------------------------------------------------------------------------------------------------


def test_blocks_of_one_layer_are_pruned_by_matched_pruning() -> None:
    unet = sd1_unet()
    dense = run(unet)
    summary = atedm.apply(unet)
    assert len(summary.pruned) == 11
    assert (run(unet) - dense).std() > 0.3 * dense.std()
    atedm.remove(unet)
    assert torch.equal(run(unet), dense)


# --- costs ------------------------------------------------------------------------------------------------------------


def test_kept_share_is_the_mean_over_steps_and_blocks() -> None:
    summary = atedm.apply(sdxl_unet(), AtEdm(0.5))
    # 4 of 11 blocks are spared in 15 of 50 steps.
    assert summary.kept_share(50) == pytest.approx((7 * 0.5 + 4 * (0.3 + 0.7 * 0.5)) / 11)
    assert summary.kept_share(1) == pytest.approx((7 * 0.5 + 4) / 11)


def test_apply_takes_a_budget_and_refuses_an_impossible_one_untouched() -> None:
    pipe = sdxl_pipeline()
    with pytest.raises(ValueError, match="pruning reaches down to"):
        atedm.apply(pipe, budget=0.05)
    assert not atedm.is_applied(pipe)
    for method in (None, "dagger", AtEdm(0.9)):
        with atedm.pruned(pipe, method, budget=0.95) as summary:
            named = METHODS["dagger"] if method == "dagger" else method or Matched()
            assert summary.method == replace(named, rate=summary.method.rate)
            assert 0.94 < summary.cost() <= 0.95
