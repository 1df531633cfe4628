import functools
from collections.abc import Callable
from typing import Any

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import atedm
from atedm.choices import PLACES
from atedm.config import PruningConfig
from atedm.costs.architectures import architecture
from atedm.costs.budget import BUDGETS_OF, solve_pruning_rate
from atedm.costs.counting import flop_counter
from atedm.costs.formula import CONVENTIONS, BlockShape, block_macs, mean_macs, step_macs
from atedm.costs.tome import LEVELS, MERGES, ToMe, tome_macs, tome_mean_macs, tome_step_macs
from atedm.costs.tomesd_patch import with_tomesd
from atedm.patching.summary import WORDS, block_shape
from atedm.patching.survey import find_blocks
from atedm.pruning import keep_count
from atedm.schedule import SCHEDULES, BlockPlace
from models import EARLY, LATE, inputs, sd1_unet, sdxl_unet, snapshot


def count(unet: UNet2DConditionModel, timestep: int, call: dict[str, Any]) -> FlopCounterMode:
    """Let torch count one call; the plain attention shows it every product."""
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        rest = dict(call)
        unet(rest.pop("sample"), timestep, **rest)  # by place, because tomesd reads the size off the first argument
    return counter


def counted_macs(unet: UNet2DConditionModel, counter: FlopCounterMode, block: str) -> float:
    """MACs of the parts of an attention block. What the ranking calls on its own is not called by any of them."""
    parts = ["proj_in", "proj_out"]
    for layer in range(len(unet.get_submodule(block).transformer_blocks)):
        parts += [f"transformer_blocks.{layer}.{part}" for part in ("attn1", "attn2", "ff")]
    flops = counter.get_flop_counts()
    return sum(sum(flops[f"UNet2DConditionModel.{block}.{part}"].values()) for part in parts) / 2


def without_overhead(shape: BlockShape, config: PruningConfig) -> int:
    macs = block_macs(shape, config)
    return macs.exact - macs.overhead


def whole_blocks(unet: UNet2DConditionModel, counter: FlopCounterMode, summary: atedm.PatchSummary) -> float:
    """MACs of the attention blocks with all that is done in them, the ranking too."""
    flops = counter.get_flop_counts()
    return sum(sum(flops[f"UNet2DConditionModel.{s.place.name}"].values()) for s in summary.shapes) / 2


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
        assert without_overhead(shape, config) == counted_macs(unet, pruned, shape.place.name)
        assert block_macs(shape).exact == counted_macs(unet, dense, shape.place.name)


def test_a_batch_costs_as_many_times_and_the_summary_is_for_one_image() -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet)
    counter = count(unet, LATE, inputs(unet, batch=3, words=WORDS))
    for block in summary.shapes:
        assert 3 * without_overhead(block, summary.config) == counted_macs(unet, counter, block.place.name)


@pytest.mark.parametrize("size", [(9, 13), (12, 20), (2, 2)])
def test_the_token_counts_of_odd_and_non_square_latents_are_right(size: tuple[int, int]) -> None:
    unet = sdxl_unet(sample_size=size)
    summary = atedm.apply(unet)
    assert summary.size == size
    counter = count(unet, LATE, inputs(unet, size, batch=1, words=WORDS))
    for block in summary.shapes:
        assert without_overhead(block, summary.config) == counted_macs(unet, counter, block.place.name)


# --- what pruning adds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_fusion": "mean-map", "iterations": 5},
        {"ranking": "attention-received"},
        {"ranking": "uniform-random"},
        {"ranking": "uniform-random", "similarity": "cosine"},
        {"ranking": "cross-attention-entropy"},
        {"ranking": "cross-attention-hard-clip", "recovery": "direct-copy"},
        {"ranking": "cross-attention-soft-clip", "similarity": "cosine", "place": "after-self-attention"},
        {"ranking": "cross-attention-power", "recovery": "bicubic", "head_fusion": "mean-map"},
        {"recovery": "zero-padding", "place": "before-feed-forward", "iterations": 1},
        {"gradual": ((0, 0.3), (1, 0.5)), "similarity": "cosine"},
        {"gradual": ((0, 0.3), (1, 0.5)), "copy_map": "first"},
        {"gradual": ((1, 0.5),), "copy_map": "first", "ranking": "uniform-random"},
        {"ranking": "representative", "recovery": "matched-update", "similarity": "euclidean", "merge": True},
        {"ranking": "lattice", "similarity": "distance", "importance_share": 0.3},
        {"ranking": "facility-location", "recovery": "weighted-update", "similarity": "distance"},
        {"ranking": "cells", "recovery": "weighted-update", "place": "before-self-attention"},
        {"ranking": "important-of-cells", "similarity": "cosine", "match_window": 2, "proportional_attention": True},
        {"ranking": "self-attention-reversed", "similarity": "attention-transposed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_overhead_is_what_torch_counts(changes: dict[str, Any], batch: int) -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, PruningConfig(**changes))
    for timestep, prune_less in ((EARLY, True), (LATE, False)):
        counter = count(unet, timestep, inputs(unet, (9, 12), batch=batch, words=WORDS))
        macs = step_macs(shapes_at(unet, (9, 12)), summary.config, summary.pruned, prune_less)
        assert batch * macs.exact == whole_blocks(unet, counter, summary)
        assert (macs.overhead > 0) == (changes != {"ranking": "uniform-random"} or summary.config.needs_attention_map)


def shapes_at(unet: UNet2DConditionModel, size: tuple[int, int]) -> list[BlockShape]:
    return [block_shape(unet, place, size) for place, _ in find_blocks(unet).values()]


# --- ToMe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("build", [sdxl_unet, sd1_unet])
def test_tome_costs_what_torch_counts_on_the_real_one(
    build: Callable[[], UNet2DConditionModel], levels: str, merge: str, ratio: float, size: tuple[int, int]
) -> None:
    unet = build()
    everything = merge == "everything"
    tomesd.apply_patch(
        unet,
        ratio=ratio,
        max_downsample=8 if levels == "all" else 1,
        merge_attn=True,
        merge_crossattn=everything,
        merge_mlp=everything,
    )
    counter = count(unet, LATE, inputs(unet, size, batch=2, words=WORDS))
    shapes = shapes_at(unet, size)
    flops = counter.get_flop_counts()
    for shape in shapes:
        name = f"UNet2DConditionModel.{shape.place.name}"
        assert 2 * tome_macs(shape, ToMe(ratio, merge, levels)).exact == sum(flops[name].values()) / 2, name
    total = tome_step_macs(shapes, ToMe(ratio, merge, levels)).exact
    assert 2 * total == sum(sum(flops[f"UNet2DConditionModel.{s.place.name}"].values()) for s in shapes) / 2


def test_tome_with_the_papers_schedule_spares_blocks_early_and_leaves_no_trace() -> None:
    unet = sdxl_unet()
    before, shapes = snapshot(unet), shapes_at(unet, (16, 16))
    tome = ToMe(0.5, prune_less_share=0.3)
    with with_tomesd(unet, tome):
        for timestep, prune_less in ((EARLY, True), (LATE, False)):
            flops = count(unet, timestep, inputs(unet, batch=2, words=WORDS)).get_flop_counts()
            counted = sum(sum(flops[f"UNet2DConditionModel.{s.place.name}"].values()) for s in shapes) / 2
            assert 2 * tome_step_macs(shapes, tome, prune_less).exact == counted
    assert snapshot(unet) == before
    less, normal = (tome_step_macs(shapes, tome, kind).exact for kind in (True, False))
    assert tome_mean_macs(shapes, tome, 50) == pytest.approx(0.3 * less + 0.7 * normal)
    assert tome_mean_macs(shapes, ToMe(0.5), 50) == normal < less


def test_tome_draws_the_same_destinations_from_the_same_seed() -> None:
    unet = sdxl_unet()
    outputs = []
    for seed in (0, 0, 1):
        torch.rand(3)  # moves the global generator, which must not matter
        with with_tomesd(unet, ToMe(0.5), seed), torch.no_grad():
            call = inputs(unet)
            outputs.append(unet(call.pop("sample"), LATE, **call).sample)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("bad", [{"ratio": 0.76}, {"ratio": -0.1}, {"merge": "all"}, {"levels": "lowest"}], ids=str)
def test_a_setting_that_tome_has_not_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ratio must be|unknown"):
        ToMe(**bad)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_step_macs_are_what_torch_counts_in_early_and_late_steps() -> None:
    unet = sdxl_unet()
    call = inputs(unet, batch=1, words=WORDS)
    config = PruningConfig(where="not-second-level", unpruned_blocks="L-F")
    summary = atedm.apply(unet, config)
    for timestep, prune_less in ((EARLY, True), (LATE, False)):
        counter = count(unet, timestep, call)
        counted = sum(counted_macs(unet, counter, shape.place.name) for shape in summary.shapes)
        macs = step_macs(summary.shapes, config, summary.pruned, prune_less)
        assert macs.exact - macs.overhead == counted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_savings_of_a_summary_are_what_torch_counts(schedule: str) -> None:
    unet = sdxl_unet()
    call = inputs(unet, batch=1, words=WORDS)

    def counted(timestep: int) -> float:
        return whole_blocks(unet, count(unet, timestep, call), summary)

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


@functools.cache
def real_sdxl() -> UNet2DConditionModel:
    return architecture("sdxl").on_meta()


def summary_of_sdxl(config: PruningConfig | str) -> atedm.PatchSummary:
    with atedm.pruned(real_sdxl(), config) as summary:
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
        BlockShape(BlockPlace("down", 1, index, 2, 2, str(index)), (10, 10), channels=8, words=1, word_width=1)
        for index in range(2)
    ]
    names = frozenset({"0", "1"})
    config = PruningConfig(pruning_rate=0.5)
    less, normal = (step_macs(blocks, config, names, kind) for kind in (True, False))
    assert less == block_macs(blocks[0]).plus(block_macs(blocks[1], config))
    assert normal == block_macs(blocks[0], config).times(2)
    for convention in CONVENTIONS:
        of_less, of_normal = less.by(convention), normal.by(convention)
        mean = mean_macs(blocks, config, names, 50, convention)
        assert mean == pytest.approx(0.3 * of_less + 0.7 * of_normal)
        mirror = config.replace(schedule="prune-more-early")
        assert mean_macs(blocks, mirror, names, 50, convention) == pytest.approx(0.3 * of_normal + 0.7 * of_less)
    solved = solve_pruning_rate(blocks, mirror, names, mean_macs(blocks, config, names))
    assert solved.pruning_rate > 0.5


def test_a_cost_out_of_reach_is_refused_with_the_range() -> None:
    block = BlockShape(BlockPlace("mid", 1, 0, 1, 2, "mid"), (10, 10), channels=8, words=1, word_width=1)
    dense = block_macs(block).exact
    floor = block_macs(block, PruningConfig(pruning_rate=1 - 1e-9)).exact
    for target in (0, floor - 1, dense + 1):
        with pytest.raises(ValueError, match=r"cannot cost .* of the dense .*; pruning reaches down to "):
            solve_pruning_rate([block], PruningConfig(), frozenset({"mid"}), target)
    assert solve_pruning_rate([block], PruningConfig(), frozenset({"mid"}), dense).pruning_rate == 0
    assert keep_count(100, solve_pruning_rate([block], PruningConfig(), frozenset({"mid"}), floor).pruning_rate) == 1


def test_gradual_pruning_has_no_one_rate_to_solve_for() -> None:
    block = BlockShape(BlockPlace("mid", 1, 0, 1, 2, "mid"), (10, 10), channels=8, words=1, word_width=1)
    with pytest.raises(ValueError, match="not for gradual pruning"):
        solve_pruning_rate([block], PruningConfig(gradual=((0, 0.5),)), frozenset({"mid"}), 1e6)


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 4), st.floats(0, 0.99), st.sampled_from(PLACES)
)
@settings(max_examples=200, deadline=None)
def test_pruning_more_never_costs_more_and_earlier_places_cost_less(
    size: tuple[int, int], layers: int, rate: float, place: str
) -> None:
    block = BlockShape(BlockPlace("mid", 1, 0, 1, layers, "mid"), size, channels=16, words=7, word_width=5, heads=2)
    costs = [without_overhead(block, PruningConfig(pruning_rate=rate, place=where)) for where in PLACES]
    assert block_macs(block).exact >= costs[0] >= costs[1] >= costs[2] > 0
    higher = without_overhead(block, PruningConfig(pruning_rate=min(rate + 0.1, 0.99), place=place))
    assert higher <= costs[PLACES.index(place)]


@given(
    st.floats(0.3, 1),
    st.sampled_from(BUDGETS_OF),
    st.sampled_from(CONVENTIONS),
    st.sampled_from(["cosine", "attention"]),
)
@settings(max_examples=50, deadline=None)
def test_a_solved_rate_keeps_to_the_budget_and_a_lower_one_does_not(
    share: float, of: str, convention: str, similarity: str
) -> None:
    shapes = summary_of_sdxl("paper").shapes
    names = frozenset(shape.place.name for shape in shapes)
    config = PruningConfig(similarity=similarity)

    def cost(config: PruningConfig) -> float:
        if of == "mean":
            return mean_macs(shapes, config, names, 50, convention)
        return step_macs(shapes, config, names, prune_less=False).by(convention)

    dense = cost(config.replace(pruning_rate=0.0))
    try:
        solved = solve_pruning_rate(shapes, config, names, share * dense, of=of, convention=convention)
    except ValueError:
        assert share * dense < cost(config.replace(pruning_rate=1 - 1e-9))
        return
    assert cost(solved) <= share * dense
    if solved.pruning_rate:
        one_token_less = solved.pruning_rate - 1 / 1024
        assert one_token_less <= 0 or cost(config.replace(pruning_rate=one_token_less)) > share * dense
