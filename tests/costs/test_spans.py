"""Arithmetic of spans, against what torch counts on the models themselves."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
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
from atedm import AtEdm, Early, Matched, Place, not_second_level
from atedm.costs.architectures import WORDS, architecture
from atedm.costs.budget import BUDGETS_OF, CostOutOfReach, fit_to_budget, profile_of
from atedm.costs.flops import flop_counter
from atedm.costs.macs import CONVENTIONS, Macs, SpanShape
from atedm.costs.spans import mean_macs, span_macs, span_run_macs, span_shape, step_macs
from atedm.costs.tome import LEVELS, MERGES, ToMe
from atedm.hosts.unet_spans import find_spans
from atedm.lab.ablation import Variant, variant_of
from atedm.lab.ablation.settings import PLACES
from atedm.lab.methods.peers import Merging
from atedm.method.contract import Method
from models import EARLY, LATE, inputs, sd1_unet, sdxl_unet, snapshot


def count(unet: UNet2DConditionModel, timestep: int, call: dict[str, Any]) -> FlopCounterMode:
    """Let torch count one call; the plain attention shows it every product."""
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        rest = dict(call)
        unet(rest.pop("sample"), timestep, **rest)  # by place, because tomesd reads the size off the first argument
    return counter


def of_spans(unet: UNet2DConditionModel, counter: FlopCounterMode) -> dict[str, float]:
    """MACs of every attention block with all that is done in it."""
    flops = counter.get_flop_counts()
    return {name: sum(flops[f"UNet2DConditionModel.{name}"].values()) / 2 for name in find_spans(unet)}


def shapes_at(unet: UNet2DConditionModel, size: tuple[int, int]) -> list[SpanShape]:
    return [span_shape(unet, place, size) for place, _ in find_spans(unet).values()]


PAPER, OURS = variant_of(AtEdm()), variant_of(Matched())


# --- one block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (sdxl_unet, AtEdm(rate=0.0)),
        (sdxl_unet, AtEdm()),
        (sdxl_unet, AtEdm(rate=0.9, iterations=5)),
        (sdxl_unet, AtEdm(where=not_second_level, spare=Early(pairing="L-F"))),
        (sdxl_unet, Matched()),
        (sdxl_unet, Matched(own_update_share=0.0, level_factors=())),
        (sd1_unet, Matched()),
        *((sdxl_unet, replace(PAPER, place=place)) for place in PLACES),
        (sdxl_unet, replace(PAPER, gradual=((0, 0.3), (1, 0.5)), place="after-self-attention")),
        (sdxl_unet, replace(PAPER, rate=0.9, refill="direct-copy", rank="cross-attention-entropy")),
        (sdxl_unet, replace(PAPER, rank="cross-attention-power", refill="bicubic", match="cosine")),
        (sdxl_unet, replace(PAPER, rank="uniform-random", head_fusion="mean-map", iterations=5)),
        (sdxl_unet, replace(PAPER, rank="attention-received")),
        (sdxl_unet, replace(PAPER, map_mode="sampled", sampled_rows=10)),
        (sdxl_unet, replace(PAPER, map_mode="blocked")),
        (sdxl_unet, replace(PAPER, map_mode="flash")),
        (sdxl_unet, replace(OURS, rank="facility-location")),
        (sdxl_unet, replace(OURS, rank="important-of-cells", match="cosine")),
        (sdxl_unet, replace(OURS, place="after-feed-forward", merge=False)),
        (sd1_unet, replace(PAPER, place="before-feed-forward")),
        (sd1_unet, replace(PAPER, place="after-self-attention")),
    ],
)
@pytest.mark.parametrize("size", [(9, 13)])
def test_macs_of_blocks_are_what_torch_counts(
    build: Callable[[], UNet2DConditionModel], method: Method, size: tuple[int, int]
) -> None:
    unet = build()
    call = inputs(unet, size, batch=2, words=WORDS)
    shapes = shapes_at(unet, size)
    dense = of_spans(unet, count(unet, LATE, call))
    assert {s.place.name: 2 * span_macs(s).exact for s in shapes} == dense
    with atedm.pruned(unet, method):
        for timestep in (EARLY, LATE):
            early = method.is_early(0.0 if timestep == EARLY else 0.99)
            counted = of_spans(unet, count(unet, timestep, call))
            assert {s.place.name: 2 * span_macs(s, method, early=early).exact for s in shapes} == counted
            assert 2 * step_macs(shapes, method, early=early).exact == sum(counted.values())


def test_overhead_is_what_the_dense_model_does_not_do() -> None:
    for shape in shapes_at(sdxl_unet(), (16, 16)):
        assert span_macs(shape).overhead == 0
        if shape.place.layers > 1:
            kept = AtEdm().count(shape.place, shape.tokens)
            n, c, heads = shape.tokens, shape.channels, shape.heads
            # By hand: queries and keys, their product, three iterations a head.
            assert span_macs(shape, AtEdm()).overhead == 2 * n * c * c + n * n * c + 3 * heads * n * n
            cover = max(1, round(0.4 * kept))
            ours = Matched(rate=0.63, level_factors=())
            assert span_macs(shape, ours).overhead == c * (cover * (n - cover) + kept * (n - kept))


def test_functions_of_one_s_own_are_counted_by_running_them() -> None:
    shape = shapes_at(sdxl_unet(), (16, 16))[-1]
    n, c = shape.tokens, shape.channels
    product = AtEdm(rank=lambda view: (view.tokens @ view.tokens.mT).sum(-1), refill=lambda given: given.before)
    assert span_macs(shape, product).overhead == n * n * c


@pytest.mark.parametrize("field", ["rank", "refill"])
def test_what_cannot_be_counted_is_left_out_and_named_once(field: str, caplog: pytest.LogCaptureFixture) -> None:
    def needs_values(given: Any) -> Any:
        tokens = given.tokens if field == "rank" else given.before
        return (tokens.sum(-1) if field == "rank" else tokens) * float(tokens.max())

    needs_values.__qualname__ = f"a_{field}_of_values"
    shapes = [shape for shape in shapes_at(sdxl_unet(), (16, 16)) if shape.place.layers > 1]
    free = {"rank": lambda view: view.tokens.sum(-1), "refill": lambda given: given.before}
    method = AtEdm(**{**free, field: needs_values})
    with caplog.at_level("WARNING", "atedm"):
        assert {span_macs(shape, method).overhead for shape in shapes} == {0}
    assert len({shape.channels for shape in shapes}) > 1  # several blocks, one warning
    (said,) = caplog.messages
    assert f"a_{field}_of_values needs the values of tokens, so its cost" in said


@pytest.mark.parametrize("field", ["rank", "refill"])
def test_what_comes_before_it_is_counted(field: str) -> None:
    def needs_values(given: Any) -> Any:
        raise NotImplementedError

    shape = shapes_at(sdxl_unet(), (16, 16))[-1]
    projected = span_macs(shape, AtEdm()).overhead
    assert 0 < span_macs(shape, AtEdm(**{field: needs_values})).overhead <= projected


# --- ToMe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 14)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
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
    counted = of_spans(unet, counter)
    tome = ToMe(ratio, merge, levels)
    assert {s.place.name: 2 * span_macs(s, tome).exact for s in shapes} == counted
    assert 2 * step_macs(shapes, tome).exact == sum(counted.values())


def test_tome_with_the_papers_schedule_spares_blocks_early_and_leaves_no_trace() -> None:
    unet = sdxl_unet()
    before, shapes = snapshot(unet), shapes_at(unet, (16, 16))
    tome = ToMe(0.5, early_share=0.3)
    with Merging(tome).applied(SimpleNamespace(unet=unet)):
        for timestep, early in ((EARLY, True), (LATE, False)):
            counted = of_spans(unet, count(unet, timestep, inputs(unet, batch=2, words=WORDS)))
            assert 2 * step_macs(shapes, tome, early=early).exact == sum(counted.values())
    assert snapshot(unet) == before
    less, normal = (step_macs(shapes, tome, early=kind).exact for kind in (True, False))
    assert mean_macs(shapes, tome, 50) == pytest.approx(0.3 * less + 0.7 * normal)
    assert mean_macs(shapes, ToMe(0.5), 50) == normal < less


def test_tome_draws_the_same_destinations_from_the_same_seed() -> None:
    unet = sdxl_unet()
    outputs = []
    for seed in (0, 0, 1):
        torch.rand(3)  # moves the global generator, which must not matter
        with Merging(ToMe(0.5)).applied(SimpleNamespace(unet=unet), seed), torch.no_grad():
            call = inputs(unet)
            outputs.append(unet(call.pop("sample"), LATE, **call).sample)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("bad", [{"ratio": 0.76}, {"ratio": -0.1}, {"merge": "all"}, {"levels": "lowest"}], ids=str)
def test_a_setting_that_tome_has_not_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ratio must be|unknown"):
        ToMe(**bad)


# --- a run ------------------------------------------------------------------------------------------------------------


def block(index: int = 0, count: int = 1, layers: int = 2, size: tuple[int, int] = (10, 10)) -> SpanShape:
    place = Place("down" if count > 1 else "mid", 1, index, count, layers, str(index))
    return SpanShape(place, size, channels=16, words=7, word_width=5, heads=2)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_run_is_its_early_and_its_normal_steps(convention: str) -> None:
    blocks = [block(index, 2) for index in range(2)]
    method = AtEdm(rate=0.5)
    early, normal = (step_macs(blocks, method, early=kind) for kind in (True, False))
    assert early == span_macs(blocks[0]).plus(span_macs(blocks[1], method))  # the first of two is spared
    assert normal == span_macs(blocks[0], method).times(2)
    expected = 0.3 * early.by(convention) + 0.7 * normal.by(convention)
    assert mean_macs(blocks, method, 50, convention) == pytest.approx(expected)
    mirror = replace(variant_of(method), schedule="prune-more-early")
    expected = 0.3 * normal.by(convention) + 0.7 * early.by(convention)
    assert mean_macs(blocks, mirror, 50, convention) == pytest.approx(expected)


def test_a_choice_that_lasts_is_paid_for_when_it_is_made() -> None:
    shape = block()
    kept = replace(PAPER, schedule="constant", refresh_every=5)
    anew, again = (kept.span_macs(shape, reuses=reuses) for reuses in (False, True))
    assert anew.overhead > again.overhead == 0
    assert anew._replace(overhead=0) == again
    assert span_run_macs(shape, kept, 12) == anew.times(3).plus(again.times(9))


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 4), st.floats(0, 0.99), st.sampled_from(PLACES)
)
@settings(max_examples=60, deadline=None)
def test_pruning_more_never_costs_more_and_earlier_places_cost_less(
    size: tuple[int, int], layers: int, rate: float, place: str
) -> None:
    shape = block(layers=layers, size=size)

    def arithmetic(rate: float, place: str) -> int:
        macs = span_macs(shape, replace(PAPER, rate=rate, place=place))
        return macs.exact - macs.overhead

    costs = [arithmetic(rate, where) for where in PLACES]
    assert span_macs(shape).exact >= costs[0] >= costs[1] >= costs[2] > 0
    assert arithmetic(min(rate + 0.1, 0.99), place) <= costs[PLACES.index(place)]


def test_macs_add_up_part_by_part() -> None:
    a, b = Macs(1, 2, 3, 4), Macs(10, 20, 30, 40)
    assert a.plus(b) == Macs(11, 22, 33, 44)
    assert a.times(3) == Macs(3, 6, 9, 12)
    assert (a.exact, a.paper, a.overhead) == (10, 3, 4)


# --- at equal cost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "steps"),
    [
        (replace(PAPER, schedule="prune-more-early"), 50),
        (AtEdm(spare=None), 20),
        (replace(PAPER, place="after-self-attention", pairing="L-M"), 50),
        (Matched(), 20),
    ],
)
def test_at_equal_cost_a_run_costs_the_same(other: Method, steps: int) -> None:
    profile = profile_of(architecture("sdxl"))
    asked = profile.mean(AtEdm(), steps)
    solved = fit_to_budget("sdxl", other, share=asked / profile.dense(), steps=steps)
    assert solved == replace(other, rate=solved.rate)  # type: ignore[type-var]
    assert profile.mean(solved, steps) <= asked
    assert profile.mean(solved, steps) == pytest.approx(asked, rel=2e-3)
    assert solved.rate != pytest.approx(0.63, abs=0.01)


@given(
    st.floats(0.5, 1), st.sampled_from(BUDGETS_OF), st.sampled_from(CONVENTIONS), st.sampled_from([AtEdm(), Matched()])
)
@settings(max_examples=10, deadline=None)
def test_a_solved_rate_keeps_to_the_budget_and_a_lower_one_does_not(
    share: float, of: str, convention: str, method: Any
) -> None:
    profile = profile_of(architecture("tiny"))

    def cost(at: Method) -> float:
        if of == "mean":
            return float(profile.mean(at, 50, convention))
        return float(profile.rest + step_macs(profile.shapes, at).by(convention))

    dense = profile.dense(convention)
    try:
        solved = fit_to_budget("tiny", method, share=share, of=of, convention=convention)
    except CostOutOfReach:
        assert share * dense < cost(replace(method, rate=1 - 1e-9))
        return
    assert cost(solved) <= share * dense
    one_token_less = solved.rate - 1 / 40  # of the 64 tokens of the third level
    assert one_token_less <= 0 or cost(replace(method, rate=one_token_less)) > share * dense


def test_a_cost_out_of_reach_is_refused_with_the_range() -> None:
    for share in (0.05, 1.01):
        with pytest.raises(CostOutOfReach, match=r"cannot cost .* of the dense .*; pruning reaches down to "):
            fit_to_budget("tiny", AtEdm(), share=share)
    assert fit_to_budget("tiny", AtEdm(), share=1.0).rate == 0


def test_what_cannot_be_pruned_has_no_budget() -> None:
    with pytest.raises(ValueError, match=r'atedm\.apply\(pipe, "matched"\) works here'):
        fit_to_budget("sd15", AtEdm(), share=0.9)
    assert isinstance(fit_to_budget("sd15", Variant(place="after-self-attention"), share=0.95), Variant)
