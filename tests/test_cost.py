import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import atedm
from atedm.config import PLACES, PruningConfig
from atedm.cost import BlockShape, block_macs, mean_macs, solve_pruning_rate, step_macs
from atedm.patching.summary import WORDS
from atedm.pruning import keep_count
from atedm.schedule import SCHEDULES, BlockPlace
from models import EARLY, LATE, inputs, sd1_unet, sdxl_unet


def count(unet: UNet2DConditionModel, timestep: int, call: dict[str, Any]) -> FlopCounterMode:
    """Let torch count one call; the plain attention shows it every product."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(**call, timestep=timestep)
    return counter


def counted_macs(unet: UNet2DConditionModel, counter: FlopCounterMode, block: str) -> float:
    """MACs of the parts of an attention block. What the ranking calls on its own is not called by any of them."""
    parts = ["proj_in", "proj_out"]
    for layer in range(len(unet.get_submodule(block).transformer_blocks)):
        parts += [f"transformer_blocks.{layer}.{part}" for part in ("attn1", "attn2", "ff")]
    flops = counter.get_flop_counts()
    return sum(sum(flops[f"UNet2DConditionModel.{block}.{part}"].values()) for part in parts) / 2


# --- one block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (sdxl_unet, PruningConfig(pruning_rate=0.0)),
        *((sdxl_unet, PruningConfig(place=place)) for place in PLACES),
        (sdxl_unet, PruningConfig(gradual=((0, 0.3), (1, 0.5)), place="after-self-attention")),
        (sdxl_unet, PruningConfig(pruning_rate=0.9, recovery="direct-copy", ranking="cross-attention-entropy")),
        (sd1_unet, PruningConfig(place="before-feed-forward")),
        (sd1_unet, PruningConfig(place="after-self-attention")),
    ],
    ids=lambda value: value.__name__ if callable(value) else f"{value.place}-{value.rates}",
)
def test_macs_of_a_block_are_what_torch_counts(
    build: Callable[[], UNet2DConditionModel], config: PruningConfig
) -> None:
    unet = build()
    call = inputs(unet, batch=1, words=WORDS)
    with atedm.pruned(unet, config) as summary:
        pruned = count(unet, LATE, call)
    dense = count(unet, LATE, call)
    assert len(summary.shapes) == 11
    for shape in summary.shapes:
        assert block_macs(shape, config) == counted_macs(unet, pruned, shape.place.name)
        assert block_macs(shape) == counted_macs(unet, dense, shape.place.name)


def test_a_batch_costs_as_many_times_and_the_summary_is_for_one_image() -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet)
    counter = count(unet, LATE, inputs(unet, batch=3, words=WORDS))
    for block in summary.shapes:
        assert 3 * block_macs(block, summary.config) == counted_macs(unet, counter, block.place.name)


@pytest.mark.parametrize("size", [(9, 13), (12, 20), (2, 2)])
def test_the_token_counts_of_odd_and_non_square_latents_are_right(size: tuple[int, int]) -> None:
    unet = sdxl_unet(sample_size=size)
    summary = atedm.apply(unet)
    assert summary.size == size
    counter = count(unet, LATE, inputs(unet, size, batch=1, words=WORDS))
    for block in summary.shapes:
        assert block_macs(block, summary.config) == counted_macs(unet, counter, block.place.name)


@functools.cache
def real_sdxl() -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """SDXL itself at 1024 px with guidance, without weights: sizes are all that is counted."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        return unet, {
            "sample": torch.empty(2, 4, 128, 128),
            "encoder_hidden_states": torch.empty(2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)},
        }


def test_sdxl_costs_what_is_known_of_it() -> None:
    unet, call = real_sdxl()
    counter = count(unet, LATE, call)
    whole = counter.get_total_flops() / 2
    assert f"{whole / 1e12:.3f}" == "6.761"  # the paper's 6.7 T leaves the products of cross-attention out
    with atedm.pruned(unet) as summary:
        counted = count(unet, LATE, call)
    dense = [2 * block_macs(shape) for shape in summary.shapes]
    assert dense == [counted_macs(unet, counter, shape.place.name) for shape in summary.shapes]
    pruned = [2 * block_macs(shape, summary.config) for shape in summary.shapes]
    assert pruned == [counted_macs(unet, counted, shape.place.name) for shape in summary.shapes]
    # The overhead of G-WPR and of making the map is no part of the saving, and is small.
    assert 0 < counted.get_total_flops() / 2 - (whole - sum(dense) + sum(pruned)) < 0.04 * whole
    assert summary.saving == pytest.approx(1 - sum(pruned) / sum(dense), rel=1e-12)
    # The paper's 38.8 % of the whole U-Net.
    assert (sum(dense) - sum(pruned)) / whole == pytest.approx(0.40, abs=0.01)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_step_macs_are_what_torch_counts_in_early_and_late_steps() -> None:
    unet = sdxl_unet()
    call = inputs(unet, batch=1, words=WORDS)
    config = PruningConfig(where="not-second-level", unpruned_blocks="L-F")
    summary = atedm.apply(unet, config)
    for timestep, prune_less in ((EARLY, True), (LATE, False)):
        counter = count(unet, timestep, call)
        counted = sum(counted_macs(unet, counter, shape.place.name) for shape in summary.shapes)
        assert step_macs(summary.shapes, config, summary.pruned, prune_less) == counted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_savings_of_a_summary_are_what_torch_counts(schedule: str) -> None:
    unet = sdxl_unet()
    call = inputs(unet, batch=1, words=WORDS)

    def counted(timestep: int) -> float:
        counter = count(unet, timestep, call)
        return sum(counted_macs(unet, counter, shape.place.name) for shape in summary.shapes)

    summary = atedm.apply(unet, PruningConfig(schedule=schedule, gradual=((0, 0.4), (1, 0.4))))
    early, late = counted(EARLY), counted(LATE)
    atedm.remove(unet)
    dense = counted(LATE)
    normal = min(early, late)
    assert summary.saving == pytest.approx(1 - normal / dense, rel=1e-12)
    assert summary.mean_saving == pytest.approx(1 - (15 * early + 35 * late) / 50 / dense, rel=1e-12)
    assert summary.run_saving(4) == pytest.approx(1 - (2 * early + 2 * late) / 4 / dense, rel=1e-12)
    assert summary.saving < summary.prunable < 1
    expected_order = {"prune-less-early": early > late, "prune-more-early": early < late, "constant": early == late}
    assert expected_order[schedule]


def test_prunable_is_what_goes_if_one_token_is_left() -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet)
    atedm.remove(unet)
    extreme = atedm.apply(unet, PruningConfig(pruning_rate=0.9999, schedule="constant"))
    assert set(map(extreme.kept, extreme.shapes)) == {1}
    assert summary.prunable == extreme.saving == extreme.prunable


def test_kept_share_is_the_mean_over_steps_and_blocks() -> None:
    summary = atedm.apply(sdxl_unet(), PruningConfig(pruning_rate=0.5))
    # 4 of 11 blocks are spared in 15 of 50 steps.
    assert summary.kept_share(50) == pytest.approx((7 * 0.5 + 4 * (0.3 + 0.7 * 0.5)) / 11)
    assert summary.kept_share(1) == pytest.approx((7 * 0.5 + 4) / 11)


# --- at equal cost ----------------------------------------------------------------------------------------------------


def summary_of_sdxl(config: PruningConfig | str) -> atedm.PatchSummary:
    with atedm.pruned(real_sdxl()[0], config) as summary:
        return summary


@pytest.mark.parametrize("steps", [50, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "prune-more-early"},
        {"schedule": "constant"},
        {"where": "not-second-level"},
        {"place": "before-feed-forward"},
        {"place": "after-self-attention", "unpruned_blocks": "L-M"},
    ],
    ids=str,
)
def test_at_equal_cost_a_run_costs_the_same(changes: dict[str, Any], steps: int) -> None:
    paper = summary_of_sdxl("paper")
    other = paper.at_equal_cost(paper.config.replace(**changes), steps)
    assert other == paper.config.replace(**changes, pruning_rate=other.pruning_rate)
    assert other.pruning_rate != pytest.approx(0.63, abs=0.01)
    saving = summary_of_sdxl(other).run_saving(steps)
    assert saving == pytest.approx(paper.run_saving(steps), abs=1e-3)
    assert saving >= paper.run_saving(steps) - 1e-12


def test_at_equal_cost_counts_the_blocks_that_the_other_config_prunes() -> None:
    dagger = summary_of_sdxl("dagger")
    everywhere = dagger.at_equal_cost(PruningConfig())
    assert everywhere.pruning_rate < 0.6
    assert summary_of_sdxl(everywhere).mean_saving == pytest.approx(dagger.mean_saving, abs=1e-3)


def test_the_mirror_prunes_more_where_it_prunes_fewer_steps() -> None:
    # By hand: one spared block of the two, both of 100 tokens.
    blocks = [
        BlockShape(BlockPlace("down", 1, index, 2, 2, str(index)), tokens=100, channels=8, words=1, word_width=1)
        for index in range(2)
    ]
    names = frozenset({"0", "1"})
    config = PruningConfig(pruning_rate=0.5)
    less, normal = (step_macs(blocks, config, names, kind) for kind in (True, False))
    assert less == block_macs(blocks[0]) + block_macs(blocks[1], config)
    assert normal == 2 * block_macs(blocks[0], config)
    assert mean_macs(blocks, config, names) == pytest.approx(0.3 * less + 0.7 * normal)
    mirror = config.replace(schedule="prune-more-early")
    assert mean_macs(blocks, mirror, names) == pytest.approx(0.3 * normal + 0.7 * less)
    solved = solve_pruning_rate(blocks, mirror, names, mean_macs(blocks, config, names))
    assert solved.pruning_rate > 0.5


def test_a_cost_out_of_reach_is_refused_with_the_range() -> None:
    block = BlockShape(BlockPlace("mid", 1, 0, 1, 2, "mid"), tokens=100, channels=8, words=1, word_width=1)
    dense = block_macs(block)
    floor = block_macs(block, PruningConfig(pruning_rate=1 - 1e-9))
    for target in (0, floor - 1, dense + 1):
        with pytest.raises(ValueError, match=r"cannot be had; pruning reaches .* to "):
            solve_pruning_rate([block], PruningConfig(), frozenset({"mid"}), target)
    assert solve_pruning_rate([block], PruningConfig(), frozenset({"mid"}), dense).pruning_rate < 0.01
    assert keep_count(100, solve_pruning_rate([block], PruningConfig(), frozenset({"mid"}), floor).pruning_rate) == 1


def test_gradual_pruning_has_no_one_rate_to_solve_for() -> None:
    block = BlockShape(BlockPlace("mid", 1, 0, 1, 2, "mid"), tokens=100, channels=8, words=1, word_width=1)
    with pytest.raises(ValueError, match="not for gradual pruning"):
        solve_pruning_rate([block], PruningConfig(gradual=((0, 0.5),)), frozenset({"mid"}), 1e6)


@given(st.integers(1, 300), st.integers(1, 4), st.floats(0, 0.99), st.sampled_from(PLACES))
@settings(max_examples=200, deadline=None)
def test_pruning_never_costs_more_and_earlier_places_cost_less(
    tokens: int, layers: int, rate: float, place: str
) -> None:
    block = BlockShape(BlockPlace("mid", 1, 0, 1, layers, "mid"), tokens, channels=16, words=7, word_width=5)
    costs = [block_macs(block, PruningConfig(pruning_rate=rate, place=where)) for where in PLACES]
    assert block_macs(block) >= costs[0] >= costs[1] >= costs[2] > 0
    higher = block_macs(block, PruningConfig(pruning_rate=min(rate + 0.1, 0.99), place=place))
    assert higher <= costs[PLACES.index(place)]
