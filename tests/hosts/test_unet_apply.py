"""Switching on and off: what `apply` and its kin do to a model, and that they undo it."""

import logging
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

import atedm
from atedm.choices import PLACES
from atedm.config import PRESETS, PruningConfig
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
    pipe, unet = sdxl_pipeline(), sdxl_unet()
    assert atedm.apply(pipe) == atedm.apply(unet)
    assert atedm.is_applied(pipe)
    assert atedm.is_applied(pipe.unet)
    assert torch.equal(run(pipe.unet), run(unet))
    atedm.remove(pipe.unet)
    assert not atedm.is_applied(pipe)


@pytest.mark.parametrize("name", PRESETS)
def test_apply_takes_a_preset_by_name(name: str) -> None:
    by_name, by_config = sdxl_unet(), sdxl_unet()
    assert atedm.apply(by_name, name) == atedm.apply(by_config, PRESETS[name])
    for timestep in (EARLY, LATE):
        assert torch.equal(run(by_name, timestep), run(by_config, timestep))


def test_the_presets_differ() -> None:
    outputs = []
    for name in PRESETS:
        unet = sdxl_unet()
        atedm.apply(unet, name)
        outputs.append(run(unet, EARLY))
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_apply_changes_no_weight_and_makes_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sdxl_unet()
    before = {name: (id(value), value.clone()) for name, value in unet.state_dict(keep_vars=True).items()}
    monkeypatch.setattr(UNet2DConditionModel, "forward", None)
    atedm.apply(unet)
    after = unet.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(id(after[name]) == old and torch.equal(after[name], value) for name, (old, value) in before.items())


def test_pruning_shows_in_the_output() -> None:
    unet = sdxl_unet()
    dense_early, dense_late = run(unet, EARLY), run(unet, LATE)
    atedm.apply(unet)
    assert (run(unet, EARLY) - dense_early).std() > 0.3 * dense_early.std()
    assert (run(unet, LATE) - dense_late).std() > 0.3 * dense_late.std()


# --- the summary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig(where="not-second-level", pruning_rate=0.8),
        PruningConfig(gradual=((0, 0.3), (1, 0.3), (2, 0.3)), unpruned_blocks="L-M"),
        PruningConfig(place="before-feed-forward", pruning_rate=0.1),
    ],
    ids=["paper", "dagger", "gradual", "before-feed-forward"],
)
@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_the_summary_says_what_really_runs(config: PruningConfig, size: tuple[int, int]) -> None:
    unet = sdxl_unet(sample_size=size)
    summary = atedm.apply(unet, config)
    shapes = {shape.place.name: shape for shape in summary.shapes}
    seen: list[atedm.BlockObservation] = []
    with atedm.observed(unet, seen.append), watched(unet) as calls:
        run(unet, EARLY, size=size)
        run(unet, LATE, size=size)
    early, late = calls
    assert late.kept.keys() == summary.pruned
    assert early.kept.keys() == summary.pruned - summary.spared
    for name, kept in (late.kept | early.kept).items():
        assert kept == summary.kept(shapes[name])
    for one in seen:
        assert one.size[0] * one.size[1] == shapes[one.block].tokens
        assert one.layer > 0 or one.importance.shape[1] == shapes[one.block].tokens


def test_the_summary_prints_blocks_kept_tokens_and_the_prunable_share() -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, PruningConfig(where="not-second-level"))
    header, *rows, total = str(summary).splitlines()
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
    assert total.startswith("6 of 11 blocks prune. At 16 x 16 latents, ")
    for part in (
        f"{summary.prunable:.0%} is prunable",
        f"a normal step saves {summary.saving:.1%}",
        f"of 50 steps {summary.mean_saving:.1%}",
    ):
        assert part in total


@pytest.mark.parametrize(("schedule", "word"), [("prune-more-early", "late"), ("constant", None)])
def test_the_summary_says_when_a_block_is_spared(schedule: str, word: str | None) -> None:
    summary = atedm.apply(sdxl_unet(), PruningConfig(schedule=schedule))
    spared = {row.split()[0]: row.split()[5:] for row in str(summary).splitlines()[1:-1]}
    assert {name for name, words in spared.items() if words} == (SPARED_F_L if word else set())
    assert all(words == [word] for words in spared.values() if words)


def test_the_width_comes_first_as_in_the_size_of_an_image() -> None:
    assert "At 13 x 9 latents" in str(atedm.apply(sdxl_unet(sample_size=(9, 13))))


# --- where ------------------------------------------------------------------------------------------------------------


def test_where_as_a_predicate_is_asked_of_every_block() -> None:
    asked: list[atedm.BlockPlace] = []

    def only_up(block: atedm.BlockPlace) -> bool:
        asked.append(block)
        return block.stage == "up" and block.level == 3

    unet = sdxl_unet()
    summary = atedm.apply(unet, PruningConfig(where=only_up))
    assert asked == [shape.place for shape in summary.shapes]
    with watched(unet) as calls:
        run(unet)
    assert calls[0].kept.keys() == {f"up_blocks.0.attentions.{index}" for index in range(3)}
    for place in asked:
        assert unet.get_submodule(place.name) is not None
        assert place.layers == {2: 2, 3: 3}[place.level]
        assert place.count == {"down": 2, "mid": 1, "up": 3}[place.stage]


def test_first_and_last_are_counted_among_all_blocks_of_a_stage_pruned_or_not() -> None:
    summary = atedm.apply(sdxl_unet(), PruningConfig(where=lambda block: block.index == 1))
    assert summary.spared == frozenset()
    assert atedm.apply(sdxl_unet()).spared == SPARED_F_L


@pytest.mark.parametrize("preset", ["dagger", "turbo"])
def test_dagger_prunes_no_block_of_the_second_level(preset: str) -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, preset)
    level = {shape.place.name: shape.place.level for shape in summary.shapes}
    with watched(unet) as calls:
        run(unet, LATE)
    assert calls[0].kept.keys() == {name for name in level if level[name] != 2} == summary.pruned


# --- exactly as before ------------------------------------------------------------------------------------------------


def test_at_rate_zero_the_image_is_bit_identical() -> None:
    pipe = sdxl_pipeline()
    dense = draw(pipe, output_type="pt")
    atedm.apply(pipe, PruningConfig(pruning_rate=0.0))
    assert torch.equal(draw(pipe, output_type="pt"), dense)


@pytest.mark.parametrize("place", PLACES[1:])
def test_at_a_rate_that_drops_no_token_the_output_is_bit_identical(place: str) -> None:
    unet = sdxl_unet()
    dense = run(unet)
    atedm.apply(unet, PruningConfig(pruning_rate=1 / 65, place=place))
    assert torch.equal(run(unet), dense)


@pytest.mark.parametrize("preset", ["paper", "matched"])
def test_remove_restores_the_image_and_every_attribute(preset: str) -> None:
    pipe = sdxl_pipeline()
    before, dense = snapshot(pipe.unet), draw(pipe)
    atedm.apply(pipe, preset)
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
    pipe = sdxl_pipeline()
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
    with atedm.pruned(unet, PruningConfig(pruning_rate=0.5)) as summary:
        assert atedm.is_applied(unet)
    assert not atedm.is_applied(unet)
    assert summary == atedm.apply(unet, PruningConfig(pruning_rate=0.5))


def test_pruned_removes_from_the_unet_it_was_applied_to() -> None:
    pipe = sdxl_pipeline()
    unet = pipe.unet
    with atedm.pruned(pipe):
        pipe.unet = small_unet()
    assert not atedm.is_applied(unet)


@pytest.mark.parametrize("preset", ["paper", "matched"])
def test_equal_seeds_give_equal_images_twice_in_a_row(preset: str) -> None:
    pipe = sdxl_pipeline()
    atedm.apply(pipe, preset)
    first = draw(pipe, seed=3)
    assert torch.equal(draw(pipe, seed=3), first)
    assert not torch.equal(draw(pipe, seed=4), first)


# --- observed ---------------------------------------------------------------------------------------------------------


def test_observers_see_the_kept_tokens_and_only_inside_the_block() -> None:
    unet = sdxl_unet()
    atedm.apply(unet, PruningConfig(gradual=((0, 0.5), (1, 0.5))))
    seen: list[atedm.BlockObservation] = []
    dense_run = run(unet)
    with atedm.observed(unet, seen.append):
        assert torch.equal(run(unet), dense_run)
    assert len(seen) == 11 + 6  # only blocks of the third level have something to run after their second layer
    for one in seen:
        batch, tokens = one.importance.shape
        assert (batch, one.importance.dtype) == (2, torch.float32)
        assert tokens == (one.size[0] * one.size[1]) >> one.layer
        assert one.keep.shape == (batch, tokens // 2)
        order = one.importance.argsort(dim=-1, descending=True, stable=True)[:, : tokens // 2]
        assert torch.equal(one.keep, order.sort(dim=-1).values)
    run(unet)
    assert len(seen) == 17


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


# --- SD 1.x -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES[1:])
def test_blocks_of_one_layer_are_pruned_inside_it(place: str) -> None:
    unet = sd1_unet()
    dense = run(unet)
    summary = atedm.apply(unet, PruningConfig(place=place))
    assert len(summary.pruned) == 11
    assert (run(unet) - dense).std() > 0.3 * dense.std()
    atedm.remove(unet)
    assert torch.equal(run(unet), dense)


@pytest.mark.parametrize("place", ["before-feed-forward", "after-self-attention"])
def test_in_one_layer_the_map_costs_more_than_it_saves_unless_none_is_needed(place: str) -> None:
    needs_none = PruningConfig(place=place, ranking="uniform-random", recovery="direct-copy")
    summary = atedm.apply(sd1_unet(), needs_none)
    assert 0.1 < summary.mean_saving < summary.saving < summary.prunable < 1
    by_attention = atedm.apply(sd1_unet(), PruningConfig(place=place))
    assert by_attention.saving < by_attention.mean_saving < 0
    assert f"a normal step saves {by_attention.saving:.1%}" in str(by_attention)
    assert "costs more than it saves" in str(by_attention)
    assert "costs more" not in str(summary)


def test_few_step_models_are_given_the_preset_for_few_steps_and_told_so_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = sdxl_pipeline(sdxl_unet())
    assert atedm.apply(pipe).config == PRESETS["paper"]
    atedm.remove(pipe)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with caplog.at_level(logging.WARNING, "atedm"):
        for _ in range(2):
            with atedm.pruned(pipe) as summary:
                assert summary.config == PRESETS["turbo"]
    assert [record.message.split()[0] for record in caplog.records] == ["LCMScheduler"]
    with atedm.pruned(pipe, "paper") as summary:
        assert summary.config == PRESETS["paper"]
    unet = sdxl_unet()
    unet.register_to_config(_name_or_path="somewhere/sdxl-lightning")
    assert atedm.apply(unet).config == PRESETS["turbo"]
    elsewhere = sdxl_unet()
    elsewhere.register_to_config(_name_or_path="turbo-folder/sdxl-base")
    assert atedm.apply(elsewhere).config == PRESETS["paper"]
