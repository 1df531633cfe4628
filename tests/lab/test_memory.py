import dataclasses
import functools
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import atedm
from atedm import AtEdm, Matched
from atedm.cli import app
from atedm.costs.architectures import architecture
from atedm.costs.tome import ToMe
from atedm.lab.ablation import Variant
from atedm.lab.bench.peak import peak_of
from atedm.lab.methods.candidates import Pruning
from atedm.lab.methods.peers import Merging
from atedm.lab.probes.memory import (
    BANDWIDTH,
    Footprint,
    MemoryReport,
    Tracer,
    memory,
    traced_footprint,
    traced_timeline,
)
from atedm.method.contract import Method
from models import EARLY, LATE, sd1_unet, sdxl_unet, small_unet, snapshot

PAPER = Pruning(AtEdm())
NO_MAPS = Variant(rank="uniform-random", refill="bicubic")
"""Ranks and refills without an attention map, so that fewer tokens are all that pruning brings."""
SIZE = (256, 256)
"""32 x 32 latents."""


def trace(function: Callable[..., Any], *given: Tensor) -> list[tuple[float, int]]:
    with torch.no_grad(), Tracer() as tracer:
        function(*given)
    return tracer.timeline


def held(function: Callable[..., Any], *given: Tensor) -> list[int]:
    """Bytes held during each operation."""
    return [size for _, size in trace(function, *given)]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Toy(nn.Module):
    """A function in the place of a U-Net."""

    def __init__(self, function: Callable[[Tensor], Any], device: str = "meta") -> None:
        super().__init__()
        self.function = function
        self.device = torch.device(device)

    def forward(self, sample: Tensor, timestep: int) -> Any:
        return self.function(sample)


# --- which bytes are held, by hand ------------------------------------------------------------------------------------


def test_a_chain_of_layers_holds_what_goes_in_and_out_of_each() -> None:
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 16))
    sizes = [3 * 8 * 4, 3 * 2 * 4, 3 * 16 * 4]  # neither weights nor the argument of the chain
    assert held(layers, meta(3, 4)) == [sizes[0], sizes[0] + sizes[1], sizes[1] + sizes[2]]


def test_a_tensor_counts_until_its_last_reference_goes() -> None:
    def freed(x: Tensor) -> None:
        first = x + 1
        del first
        second = x[:5] + 1
        assert second.shape == (5,)

    def kept(x: Tensor) -> None:
        first = x + 1
        second = x[:5] + 1
        assert first.shape != second.shape

    assert held(freed, meta(10)) == [40, 20]
    assert held(kept, meta(10)) == [40, 60]


def test_what_takes_the_place_of_something_freed_is_counted_anew() -> None:
    def loop(x: Tensor) -> None:
        for _ in range(100):
            y = x + 1
        del y
        _ = x + 1

    assert held(loop, meta(10)) == [40] + [80] * 99 + [40]


def test_views_count_once_and_hold_what_they_are_views_of() -> None:
    def views(x: Tensor) -> None:
        y = (x + 1).view(2, 5).t()[1:]  # 16 of 40 bytes
        z = y.expand(3, 4, 2).detach()
        del y
        _ = x[:1] + 1
        assert z.shape == (3, 4, 2)

    assert held(views, meta(10)) == [40, 44]


def test_in_place_takes_nothing_and_arguments_are_never_counted() -> None:
    def change(x: Tensor) -> None:
        x.add_(1)
        x.view(5, 2).mul_(2)
        y = x + 1
        y.add_(1)

    assert held(change, meta(10)) == [0, 0, 40, 40]


def test_every_output_counts_and_what_is_on_the_host_does_not() -> None:
    def both(x: Tensor) -> None:
        torch.ones(1000).add_(1)
        x.topk(4)  # float32 values, int64 places
        _ = x * torch.tensor(2.0)

    assert held(both, meta(10)) == [4 * 4 + 4 * 8, 40]


# --- how long an operation takes, by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shapes", "dtype", "seconds"),
    [
        # Arithmetic: two operations a product.
        (torch.mm, [(4096, 4096), (4096, 4096)], torch.float16, 2 * 4096**3 / 312e12),
        (torch.mm, [(4096, 4096), (4096, 4096)], torch.bfloat16, 2 * 4096**3 / 312e12),
        (torch.mm, [(4096, 4096), (4096, 4096)], torch.float32, 2 * 4096**3 / 19.5e12),
        # Traffic: what is read and what is written.
        (torch.mm, [(2, 4096), (4096, 4)], torch.float16, 2 * (2 * 4096 + 4096 * 4 + 2 * 4) / 1555e9),
        (torch.add, [(100,), (100,)], torch.float32, 3 * 400 / 1555e9),
        (Tensor.add_, [(100,), (100,)], torch.float32, 3 * 400 / 1555e9),
        (lambda x: x.expand(50, 100) + 1, [(1, 100)], torch.float32, (400 + 50 * 400) / 1555e9),
        (lambda x: x[:, :10] + 1, [(1, 100)], torch.float32, 2 * 40 / 1555e9),
        # What only takes the shape of its argument does not read it.
        (lambda x: x.new_zeros(10), [(100,)], torch.float32, 40 / 1555e9),
        (torch.zeros_like, [(100,)], torch.float32, 400 / 1555e9),
        (torch.softmax, [(10, 100)], torch.float16, None),
    ],
)
def test_an_operation_lasts_as_long_as_its_arithmetic_or_its_traffic(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], dtype: torch.dtype, seconds: float | None
) -> None:
    if seconds is None:
        function, seconds = functools.partial(function, dim=-1), 2 * 2 * 1000 / 1555e9
    timeline = trace(function, *(meta(*shape, dtype=dtype) for shape in shapes))
    assert timeline[-1][0] == pytest.approx(seconds, rel=1e-12)
    assert len(timeline) == 1


def test_views_take_no_time() -> None:
    assert trace(lambda x: x.view(2, 5).t().unbind(0)[1].expand(3, 2), meta(10)) == []


# --- attention, by hand -----------------------------------------------------------------------------------------------


def attend(x: Tensor) -> Tensor:
    """Attention of one tensor (B, H, N, D) to itself."""
    return functional.scaled_dot_product_attention(x, x, x)


def test_fused_attention_makes_its_output_only() -> None:
    small, large = ({"sample": meta(2, 3, tokens, 8, dtype=torch.float16)} for tokens in (64, 65536))
    size = 2 * 3 * 64 * 8 * 2
    assert traced_timeline(Toy(attend), small, LATE) == [
        (pytest.approx((4 * size + 16) / BANDWIDTH, rel=1e-3), size + 16)
    ]
    ((seconds, _),) = traced_timeline(Toy(attend), large, LATE)
    assert seconds == pytest.approx(2 * 2 * 2 * 3 * 65536**2 * 8 / 312e12, rel=1e-12)  # both products


def test_plain_attention_holds_the_map_of_every_head_before_and_after_the_softmax() -> None:
    call = {"sample": meta(2, 3, 64, 8, dtype=torch.float16)}
    size, maps = 2 * 3 * 64 * 8 * 2, 2 * 3 * 64 * 64 * 2
    timeline = traced_timeline(Toy(attend), call, LATE, attention="plain")
    assert [bytes_held for _, bytes_held in timeline] == [maps, 2 * maps, maps + size]
    times = [2 * size + maps, 2 * maps, maps + 2 * size]
    assert [seconds for seconds, _ in timeline] == pytest.approx([time / BANDWIDTH for time in times], rel=1e-12)


def test_a_float32_softmax_of_half_a_map_makes_no_float32_copy_of_it() -> None:
    call = {"sample": meta(10, dtype=torch.float16)}
    convert = Toy(functools.partial(torch.softmax, dim=-1, dtype=torch.float32))
    assert [size for _, size in traced_timeline(convert, call, LATE)] == [40]
    same = Toy(functools.partial(torch.softmax, dim=-1))
    assert [size for _, size in traced_timeline(same, call, LATE)] == [20]


# --- a U-Net ----------------------------------------------------------------------------------------------------------


def on_meta(unet: UNet2DConditionModel) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Its twin without weights, and a call of two images."""
    found = architecture(unet)
    return found.on_meta(), found.call(SIZE, batch=2)


def test_a_footprint_is_the_peak_and_the_mean_over_time_of_the_timeline() -> None:
    unet, call = on_meta(small_unet())
    timeline = traced_timeline(unet, call, LATE, attention="plain")
    footprint = traced_footprint(unet, call, LATE, attention="plain")
    total = sum(Fraction(seconds) for seconds, _ in timeline)
    assert footprint.average == pytest.approx(float(sum(Fraction(s) * size for s, size in timeline) / total), rel=1e-12)
    assert footprint.seconds == pytest.approx(float(total), rel=1e-12)
    assert footprint.peak == sorted(size for _, size in timeline)[-1]


@pytest.mark.parametrize(
    ("build", "method"),
    [(sdxl_unet, None), (sdxl_unet, AtEdm()), (sd1_unet, Matched()), (small_unet, NO_MAPS)],
)
def test_the_traced_peak_is_the_one_measured_on_the_cpu(
    build: Callable[[], UNet2DConditionModel], method: Method | None
) -> None:
    # With the maps of plain attention the peak is where nothing is hidden from the trace; a convolution on the CPU
    # takes workspace of its own, and the index of the step is on the host. That is what the tolerance is for.
    unet = build()
    unet.set_attn_processor(AttnProcessor())
    twin, call = on_meta(unet)
    real = architecture(unet).call(SIZE, batch=2, device="cpu")
    if method is not None:
        atedm.apply(unet, method)
        atedm.apply(twin, method)

    @torch.no_grad()
    def step() -> None:
        unet(timestep=LATE, **real)

    step()
    measured = peak_of(step, torch.device("cpu"))
    traced = traced_footprint(twin, call, LATE, attention="plain")
    assert traced.peak == pytest.approx(measured, rel=2e-3)


def test_tracing_leaves_everything_as_it_was() -> None:
    unet, call = on_meta(small_unet())
    before = snapshot(unet)
    original = functional.scaled_dot_product_attention
    for attention in ("fused", "plain"):
        with atedm.pruned(unet, AtEdm()):
            traced_footprint(unet, call, LATE, attention=attention)
    assert snapshot(unet) == before
    assert functional.scaled_dot_product_attention is original
    assert not atedm.is_applied(unet)
    assert [size for _, size in traced_timeline(unet, call, LATE)] == [
        size for _, size in traced_timeline(on_meta(small_unet())[0], call, LATE)
    ]


def test_only_the_meta_device_is_traced_and_names_are_checked() -> None:
    unet = small_unet()
    twin, call = on_meta(unet)
    with pytest.raises(ValueError, match="only a U-Net on the meta device can be traced, not one on cpu"):
        traced_footprint(unet, call, LATE)
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        traced_footprint(twin, call, LATE, attention="plane")


# --- dense and pruned -------------------------------------------------------------------------------------------------


def test_sdxl_as_the_paper_runs_it_keeps_its_peak_and_the_map_is_why() -> None:
    found = architecture("sdxl")
    unet, call = nn.Module.to(found.on_meta(), torch.float16), found.call(batch=2, dtype=torch.float16)
    plain, fused = (traced_footprint(unet, call, LATE, attention=attention).peak for attention in ("plain", "fused"))
    with atedm.pruned(unet, AtEdm()):
        assert traced_footprint(unet, call, LATE, attention="fused").peak <= 1.1 * fused
    with atedm.pruned(unet, AtEdm(sample=None)):
        pruned, fused_pruned = (traced_footprint(unet, call, LATE, attention=kind).peak for kind in ("plain", "fused"))
    maps = 2 * 10 * 4096**2 * 2  # both halves, 10 heads, float16
    assert 2 * maps < plain < 2 * maps + fused
    assert fused < maps
    assert plain <= pruned
    # The ranking holds three maps of one head: the sum so far, the product in float16 and its softmax.
    one_head = 2 * 4096**2 * (4 + 2 + 4)
    assert one_head < fused_pruned < one_head + fused / 2


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_fewer_tokens_take_less(attention: str) -> None:
    report = memory(small_unet(), Pruning(NO_MAPS), size=(512, 512), attention=attention)
    assert report.normal_step.average < report.early_step.average < report.dense.average
    assert report.normal_step.seconds < report.early_step.seconds < report.dense.seconds
    assert report.normal_step.peak == pytest.approx(report.dense.peak, rel=0.01)  # a first layer has all tokens
    assert report.normal_step.average < report.mean_average < report.early_step.average
    assert 0 < report.more_jobs_with_weights < report.more_jobs


@pytest.mark.parametrize("method", [AtEdm(), NO_MAPS], ids=["paper", "without-maps"])
def test_plain_attention_never_takes_less_than_fused(method: Method) -> None:
    plain, fused = (memory(small_unet(), Pruning(method), size=SIZE, attention=kind) for kind in ("plain", "fused"))
    for kind in ("dense", "normal_step", "early_step"):
        assert getattr(plain, kind).peak >= getattr(fused, kind).peak
        # Pruning's own map takes the same in a shorter step, so it weighs more in the mean of a fused one.
        if method is NO_MAPS:
            assert getattr(plain, kind).average > getattr(fused, kind).average
    assert (plain.attention, fused.attention) == ("plain", "fused")


def test_a_batch_takes_as_many_times() -> None:
    unet = small_unet()
    one, four = (memory(unet, Pruning(NO_MAPS), size=(512, 512), batch=batch) for batch in (1, 4))
    for kind in ("dense", "normal_step", "early_step"):
        # But for one timestep, and for the traffic of the weights in the time.
        assert getattr(four, kind).peak == pytest.approx(4 * getattr(one, kind).peak, rel=1e-4)
        assert getattr(four, kind).average == pytest.approx(4 * getattr(one, kind).average, rel=0.05)
    assert one.weights == four.weights


def test_guidance_is_a_batch_twice_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = small_unet()
    guided, unguided = (memory(unet, PAPER, guidance=guidance) for guidance in (True, False))
    assert guided == memory(unet, PAPER, batch=2, guidance=False) == memory(unet, PAPER)
    without = dataclasses.replace(architecture(unet), guidance=False)
    monkeypatch.setattr("atedm.lab.probes.memory.architecture", lambda model: without)
    assert memory(unet, PAPER) == unguided


def test_the_precision_is_that_of_weights_and_activations() -> None:
    unet = small_unet()
    half, whole = (memory(unet, PAPER, dtype=dtype, attention="plain") for dtype in (torch.float16, torch.float32))
    assert whole.weights == 2 * half.weights == sum(p.numel() * 4 for p in unet.parameters())
    assert whole.dense.peak == pytest.approx(2 * half.dense.peak, rel=1e-3)
    assert unet.dtype is torch.float32
    assert not atedm.is_applied(unet)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 0.3),
        ({"schedule": "prune-more-early"}, 0.7),
        ({"schedule": "constant"}, 0),
        ({"early_share": 1.0}, 1),
    ],
    ids=str,
)
def test_each_kind_of_step_is_traced_where_the_schedule_has_it(changes: dict[str, Any], share: float) -> None:
    method = dataclasses.replace(NO_MAPS, **changes)
    report = memory(small_unet(), Pruning(method), size=SIZE, dtype=torch.float32)
    unet, call = on_meta(small_unet())
    with atedm.pruned(unet, method):
        steps = {timestep: traced_footprint(unet, call, timestep) for timestep in (EARLY, LATE)}
    kinds = {method.is_early(place): step for place, step in ((0.0, steps[EARLY]), (0.99, steps[LATE]))}
    if len(kinds) == 2:
        assert (report.early_step, report.normal_step) == (kinds[True], kinds[False])
        assert report.early_step.seconds > report.normal_step.seconds
    else:
        assert report.early_step == report.normal_step == steps[EARLY] == steps[LATE]
    assert report.early_share == share
    run = [steps[EARLY if i < 15 else LATE] for i in range(50)]
    time = sum(Fraction(step.seconds) for step in run)
    average = sum(Fraction(step.seconds) * Fraction(step.average) for step in run) / time
    assert report.mean_average == pytest.approx(float(average), rel=1e-12)


def test_a_run_of_few_steps_has_its_own_share_of_early_ones() -> None:
    assert memory("sdxl-turbo", Pruning(NO_MAPS), size=SIZE).early_share == 0.5


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch must be"):
        memory(small_unet(), PAPER, batch=0)


# --- the report -------------------------------------------------------------------------------------------------------


def by_hand(share: float = 0.25) -> MemoryReport:
    gib = 2**30
    dense, normal, early = (
        Footprint(4 * gib, average * gib, seconds) for average, seconds in ((3.0, 5.0), (1.0, 2.0), (2.0, 3.0))
    )
    return MemoryReport(dense, normal, early, weights=gib // 2, early_share=share, attention="fused")


def test_a_report_weighs_steps_by_their_number_and_their_time() -> None:
    report = by_hand()
    mean = (0.25 * 3 * 2 + 0.75 * 2 * 1) / (0.25 * 3 + 0.75 * 2)
    assert report.mean_average == pytest.approx(mean * 2**30)
    assert report.more_jobs == pytest.approx(3 / mean - 1)
    assert report.more_jobs_with_weights == pytest.approx(3.5 / (mean + 0.5) - 1)
    assert (by_hand(0).mean_average, by_hand(1).mean_average) == (2**30, 2 * 2**30)
    assert by_hand(1).more_jobs == 0.5


def test_the_papers_own_figures_give_its_share_of_jobs() -> None:
    dense, step = Footprint(0, 18.8, 1), Footprint(0, 12.6, 1)
    assert f"{MemoryReport(dense, step, step, 0, 0.3, 'plain').more_jobs:.1%}" == "49.2%"


def test_a_report_is_plain_json() -> None:
    plain = json.loads(json.dumps(by_hand().as_dict()))
    assert plain["normal_step"] == {"peak": 4 * 2**30, "average": 2**30, "seconds": 2.0}
    assert plain["more_jobs"] == pytest.approx(1.25)
    assert "freed" in plain["assumption"]


def test_tome_is_traced_by_its_own_package_and_taken_off_again() -> None:
    traced = memory("tiny", Merging(ToMe(0.5)), attention="plain")
    assert traced.normal_step == traced.early_step
    assert traced.normal_step.average < traced.dense.average
    assert memory("tiny", Merging(ToMe(0.0)), attention="plain").more_jobs == 0
    early = memory("tiny", Merging(ToMe(0.5, early_share=0.3)), attention="plain")
    assert early.normal_step.average < early.early_step.average
    assert early.early_share == 0.3


def test_the_command_prints_a_table_and_json() -> None:
    arguments = ["lab", "memory", "tome[ratio=0.4]", "--model", "tiny", "--attention", "plain"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "| dense | " in done.output
    assert "More jobs in the same memory, over a run: +" in done.output
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["attention"] == "plain"
    done = CliRunner().invoke(app, ["lab", "memory", "deepcache", "--model", "tiny"])
    assert "memory is traced" in str(done.exception)
