"""Time of the parts of pruning. Nothing here looks at how long anything took, only at what was timed and summed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import nn

import atedm
from atedm.cli.latency import _table
from atedm.cli.latency import latency as latency_command
from atedm.config import PruningConfig
from atedm.costs import latency as latency_module
from atedm.costs import pruning_parts
from atedm.costs.architectures import architecture
from atedm.costs.latency import PAPER, LatencyReport, Spread, WayLatency, latency, time_parts, time_steps
from atedm.costs.machine import processor_of, versions_of
from atedm.costs.pruning_parts import MAP_WAYS, PARTS, WAYS, PrunedShape, prune_once, pruned_shapes, why_not
from atedm.costs.random_weights import random_unet
from atedm.costs.stopwatch import Stopwatch, free_memory
from atedm.patching.apply import is_applied
from atedm.patching.pruning_layer import queries_and_keys
from atedm.patching.summary import PatchSummary
from atedm.pictures.latency_chart import latency_chart
from atedm.ranking import gwpr, rank_by_attention
from atedm.token_pruning import choose_tokens, drop_tokens
from atedm.token_ranking import QueriesAndKeys, rank_tokens
from models import run, sdxl_unet, small_unet, watched

CPU = torch.device("cpu")


def summary_of(unet: Any, config: PruningConfig | str = "paper") -> PatchSummary:
    with atedm.pruned(unet, config) as summary:
        return summary


def report_of(way: WayLatency, dense: float = 40.0) -> LatencyReport:
    step = Spread(dense, dense - 1, dense + 2)
    return LatencyReport(
        model="sdxl",
        weights="random",
        config={},
        size=(1024, 1024),
        batch=1,
        guidance=True,
        steps=50,
        dtype="bfloat16",
        device="cpu",
        processor="a CPU",
        threads=2,
        repeats=3,
        versions={},
        dense_step=step,
        pruned_step=step,
        step_ratio=Spread(1, 1, 1),
        shapes=(),
        ways={"head-by-head": way, "all-heads": WayLatency({}, (), "too large")},
    )


TEN_EACH = WayLatency(dict.fromkeys(PARTS, 10.0), ())


class ScriptedWatch:
    """A stopwatch whose every lap takes what the script says for its round."""

    script: Callable[[str], float]
    on_lap: Callable[[], None]

    def __init__(self, device: torch.device) -> None:
        self.total: Counter[str] = Counter()

    def lap(self, name: str) -> None:
        type(self).on_lap()
        self.total[name] += type(self).script(name)  # type: ignore[assignment]

    def read(self) -> dict[str, float]:
        return dict(self.total)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedWatch]:
    monkeypatch.setattr(latency_module, "Stopwatch", ScriptedWatch)
    ScriptedWatch.script = staticmethod(lambda name: 1.0)
    ScriptedWatch.on_lap = staticmethod(lambda: None)
    return ScriptedWatch


# --- the parts are what the patch does --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way != "sampled"])
@pytest.mark.parametrize("changes", [{}, {"iterations": 1}])
def test_parts_give_what_the_patch_gives(way: str, changes: dict[str, Any]) -> None:
    layer = sdxl_unet().down_blocks[2].attentions[0].transformer_blocks[0]
    tokens = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    config = PruningConfig(**changes)
    with torch.no_grad():
        ranking = rank_tokens(config, tokens, lambda: queries_and_keys(layer.attn1, layer.norm1, tokens), _never)
        kept, dropped = drop_tokens(tokens, choose_tokens(tokens, ranking, 6, (4, 4), config), (4, 4), config)
        mine = prune_once(layer, tokens, 6, config, way, lambda part: None)
    torch.testing.assert_close(mine.importance, ranking.importance, rtol=1e-4, atol=1e-8)
    assert torch.equal(mine.keep, dropped.keep)
    assert torch.equal(mine.kept, kept)
    assert torch.equal(mine.filled, dropped.refill(kept))


@pytest.mark.parametrize("way", MAP_WAYS)
def test_every_way_ranks_alike(way: str) -> None:
    q, k = torch.randn(2, 2, 3, 16, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    usual = rank_by_attention(q, k, 0.5)
    mine = MAP_WAYS[way](QueriesAndKeys(q, k, 0.5), gwpr, lambda part: None)
    torch.testing.assert_close(mine.importance, usual.importance, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(mine.attention_map, usual.attention_map, rtol=1e-5, atol=1e-8)


def _never() -> Any:
    raise AssertionError("cross-attention plays no part")


@pytest.mark.parametrize("way", WAYS)
def test_every_part_is_lapped_once_it_is_done(way: str) -> None:
    layer = small_unet().down_blocks[1].attentions[0].transformer_blocks[0]
    laps: list[str] = []
    prune_once(layer, torch.randn(1, 16, 32), 6, PruningConfig(), way, laps.append)
    in_order = list(dict.fromkeys(laps))
    assert in_order == list(PARTS)
    assert laps[-3:] == ["mask", "drop", "fill"]
    # Once a head; or once to have the maps of all, and once to be rid of them.
    assert laps.count("get map") == {"head-by-head": layer.attn1.heads, "all-heads": 2}.get(way, 1)


def test_head_by_head_never_holds_two_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    real = pruning_parts.maps_in_turn

    def counted(*attention: Any) -> Any:
        return map(note, real(*attention))

    def note(a: torch.Tensor) -> torch.Tensor:
        places.append(a.data_ptr())
        return a

    monkeypatch.setattr(pruning_parts, "maps_in_turn", counted)
    layer = sdxl_unet().down_blocks[2].attentions[0].transformer_blocks[0]
    prune_once(layer, torch.randn(1, 16, 48), 6, PruningConfig(), "head-by-head", lambda part: None)
    assert len(places) == 3
    assert len(set(places)) == 1


# --- how often they are done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        # Level 2: 2 down and 3 up blocks; level 3: 2 down, 3 up and the middle. One a stage is spared in 15 steps.
        ("paper", {(64, 24, 32, 2): 5 * 50 - 2 * 15, (16, 6, 48, 3): 6 * 50 - 2 * 15}),
        ("dagger", {(16, 6, 48, 3): 6 * 50 - 2 * 15}),
        ("turbo", {(16, 6, 48, 3): 6 * 50}),
    ],
)
def test_blocks_times_steps_by_hand(preset: str, expected: dict[tuple[int, ...], int]) -> None:
    shapes = pruned_shapes(summary_of(sdxl_unet(), preset), 50)
    assert {(s.tokens, s.kept, s.channels, s.heads): s.times for s in shapes} == expected


@pytest.mark.parametrize("schedule", ["prune-less-early", "prune-more-early", "constant"])
def test_blocks_times_steps_as_a_run_of_the_patch_has_them(schedule: str) -> None:
    unet = small_unet()
    config = PruningConfig(schedule=schedule)
    timesteps = torch.linspace(999, 0, 10)
    with atedm.pruned(unet, config) as summary, watched(unet) as calls:
        for timestep in timesteps:
            run(unet, timestep)
    done = Counter(block for call in calls for block in call.kept)
    for shape in pruned_shapes(summary, len(timesteps)):
        assert shape.times == sum(done.pop(block) for block in shape.blocks)
    assert not done


def test_medians_without_the_first_round_times_how_often(scripted: type[ScriptedWatch]) -> None:
    unet = sdxl_unet()
    shapes = pruned_shapes(summary_of(unet), 50)
    told: list[tuple[str, int, int]] = []
    a_lap = {0: 1000.0, 1: 1.0, 2: 9.0, 3: 2.0}
    scripted.script = staticmethod(lambda name: a_lap[len(told)] * (5 if name == "fill" else 1))
    ways = time_parts(unet, shapes, PruningConfig(), 2, 3, lambda *at: told.append(at))
    assert told == [("parts", done, 4) for done in (1, 2, 3, 4)]
    naive, ours = ways["all-heads"], ways["head-by-head"]
    assert naive.per_block == ({"get map": 4, "rank": 2, "mask": 2, "drop": 2, "fill": 10},) * 2
    assert naive.run == {"get map": 1960, "rank": 980, "mask": 980, "drop": 980, "fill": 4900}
    assert [block["get map"] for block in ours.per_block] == [4, 6]  # a lap a head
    assert ours.run["get map"] == 220 * 4 + 270 * 6
    assert not naive.skipped


def test_the_tokens_timed_have_the_shapes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sdxl_unet().to(torch.bfloat16)
    shapes = pruned_shapes(summary_of(unet), 50)
    seen: list[Any] = []

    def note(layer: nn.Module, tokens: torch.Tensor, count: int, config: Any, way: str, lap: Any) -> None:
        seen.append((tuple(tokens.shape), tokens.dtype, count, way))
        for part in PARTS:
            lap(part)
        assert tokens.shape[2] == layer.attn1.to_q.in_features

    monkeypatch.setattr(latency_module, "prune_once", note)
    time_parts(unet, shapes, PruningConfig(), 3, 1)
    sizes = (((3, 64, 32), 24), ((3, 16, 48), 6))
    here = [way for way in WAYS if way != "triton"]
    one_round = [(shape, torch.bfloat16, count, way) for way in here for shape, count in sizes]
    assert seen == 2 * one_round


def test_steps_are_timed_in_turns_and_nothing_is_spared(scripted: type[ScriptedWatch]) -> None:
    unet = small_unet()
    call = architecture(unet).call((64, 64), 2, device="cpu")
    patched: list[bool] = []

    def look() -> None:
        patched.append(is_applied(unet))
        assert not torch.is_grad_enabled()
        if patched[-1]:
            assert not unet._atedm.prune_less

    times = iter([1000, 1000, 10, 5, 20, 30, 40, 8])
    scripted.on_lap = staticmethod(look)
    scripted.script = staticmethod(lambda name: float(next(times)))
    dense, normal, ratio = time_steps(unet, call, PruningConfig(prune_less_share=1.0), 3)
    assert patched == [False, True] * 4
    assert dense == (20, 10, 40)
    assert normal == (8, 5, 30)
    assert ratio == (0.5, 0.2, 1.5)
    assert not is_applied(unet)


def test_laps_of_a_name_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 3.5, 4.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(CPU)
    for name in ("a", "b", "a"):
        watch.lap(name)
    assert watch.read() == {"a": 1500.0, "b": 2000.0}


# --- memory -----------------------------------------------------------------------------------------------------------


def test_all_heads_are_passed_over_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [PrunedShape(16, 6, 8, 1, ("a",), 1), PrunedShape(64, 24, 8, 10, ("b",), 1)]
    needed = 2 * 10 * 64**2 * (4 + 2)

    def with_free(free: float, way: str = "all-heads") -> str:
        monkeypatch.setattr(pruning_parts, "free_memory", lambda device: free)
        return why_not(way, shapes, 2, torch.bfloat16, CPU)

    assert with_free(3 * needed + 1) == ""
    assert "10 heads of 64 tokens" in with_free(3 * needed - 1)
    assert with_free(0, "head-by-head") == ""
    assert with_free(0, "triton") == "its kernels run on CUDA"


def test_a_way_passed_over_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning_parts, "free_memory", lambda device: 1000.0)
    report = latency("tiny", "dagger", repeats=1, device="cpu")
    assert report.as_dict()["device"] == "cpu"
    assert processor_of("cpu") == report.processor in report.headline()
    assert report.versions == versions_of("torch", "diffusers")
    assert report.ways["all-heads"].run == {}
    assert "third of the 0.0 GiB free" in report.ways["all-heads"].skipped
    assert report.ways["head-by-head"].run.keys() == set(PARTS)
    assert report.as_dict()["share_of_dense_run"]["all-heads"] == {}
    lines = _table(report, "")
    assert lines[1].split() == ["ms", "a", "run", "head-by-head", "blocked", "flash", "sampled"]
    assert any(line.startswith("all-heads is left out: the maps of 3 heads of 64 tokens") for line in lines)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**20 < free_memory(CPU) < 2**50


# --- random weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_weights_run_and_stay_finite(dtype: torch.dtype) -> None:
    arch = architecture("tiny")
    unet = random_unet(arch, dtype)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert not unet.training
    with torch.no_grad():
        out = unet(timestep=1, **arch.call(device="cpu", dtype=dtype)).sample.float()
    assert out.isfinite().all()
    assert 0.05 < out.std() < 20
    assert unet.num_parameters() == arch.on_meta().num_parameters()


def test_random_weights_are_told_by_their_seed() -> None:
    arch = architecture(small_unet())
    one, same, other = (random_unet(arch, seed=seed) for seed in (0, 0, 1))
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert all(not torch.equal(a, c) for a, _, c in pairs if a.ndim > 1)


def test_random_weights_keep_the_variance_and_do_not_repeat() -> None:
    unet = random_unet(architecture("tiny"))
    seen = set()
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
            continue
        rows = parameter.detach().flatten(1)
        if rows.numel() > 4000:
            assert float(rows.std()) == pytest.approx(rows.shape[1] ** -0.5, rel=0.1)
            assert len(rows.unique(dim=0)) == len(rows)
        seen.add(tuple(rows.flatten()[:8].mul(rows.shape[1] ** 0.5).tolist()))
    assert len(seen) == sum(parameter.ndim > 1 for parameter in unet.parameters())


def test_a_weight_larger_than_the_noise_is_filled_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atedm.costs.random_weights._NOISE", 101)
    unet = random_unet(architecture(small_unet()))
    weight = unet.conv_in.weight.detach().flatten()  # 16 x 4 x 3 x 3
    assert torch.equal(weight[:101], weight[101:202])
    assert torch.equal(weight[505:576], weight[:71])
    assert all(float(parameter.detach().std()) > 0 for parameter in unet.parameters() if parameter.ndim > 1)


# --- the whole report -------------------------------------------------------------------------------------------------


def test_report_of_the_shipped_model() -> None:
    told: list[tuple[str, int, int]] = []
    report = latency(
        "tiny", "paper", size=(64, 96), batch=2, steps=10, repeats=1, device="cpu", progress=lambda *at: told.append(at)
    )
    assert told == [(what, done, 2) for what in ("parts", "steps") for done in (1, 2)]
    assert (report.weights, report.size, report.batch, report.guidance) == ("shipped", (64, 96), 2, True)
    assert [shape.tokens for shape in report.shapes] == [8 * 12, 4 * 6]
    plain = json.loads(json.dumps(report.as_dict()))
    assert {
        "model", "weights", "config", "size", "batch", "guidance", "steps", "dtype", "device", "processor", "threads",
        "repeats", "versions", "dense_step", "pruned_step", "step_ratio", "shapes", "ways", "dense_run",
        "share_of_dense_run",
    } == plain.keys()  # fmt: skip
    assert plain["dtype"] == "float32"
    assert plain["config"]["pruning_rate"] == 0.63
    assert plain["versions"].keys() == {"python", "torch", "diffusers"}
    assert plain["dense_step"].keys() == {"median", "low", "high"}
    assert plain["dense_run"] == 10 * plain["dense_step"]["median"]
    for way in {*WAYS} - {"triton"}:
        for part in PARTS:
            taken = plain["ways"][way]["run"][part]
            assert taken > 0
            assert plain["share_of_dense_run"][way][part] == taken / plain["dense_run"]


@pytest.mark.parametrize(("guidance", "batch"), [(None, 4), (True, 4), (False, 2)])
def test_other_models_run_random_weights_on_the_batch_asked_for(
    guidance: bool | None, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_unet().save_config(tmp_path / "unet")
    calls: list[dict[str, Any]] = []

    def note(unet: nn.Module, call: dict[str, Any], *_: Any) -> tuple[Spread, ...]:
        calls.append(call)
        return (Spread(1, 1, 1),) * 3

    monkeypatch.setattr(latency_module, "time_steps", note)
    report = latency(str(tmp_path), batch=2, guidance=guidance, repeats=1, dtype=torch.bfloat16, device="cpu")
    assert report.weights == "random"
    assert report.dtype == "bfloat16"
    assert report.guidance is (guidance is not False)
    assert calls[0]["sample"].shape == (batch, 4, 16, 16)
    assert calls[0]["sample"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tiny", {"config": PruningConfig(ranking="attention-received")}, "ranking='attention-received' has others"),
        ("tiny", {"config": PruningConfig(head_fusion="mean-map")}, "head_fusion"),
        ("tiny", {"config": PruningConfig(tolerance=1e-3)}, "tolerance"),
        ("tiny", {"config": PruningConfig(recovery="direct-copy")}, "recovery"),
        ("tiny", {"config": PruningConfig(similarity="cosine")}, "similarity"),
        ("tiny", {"config": PruningConfig(gradual=((0, 0.5),))}, "gradual"),
        ("tiny", {"config": PruningConfig(refresh_every=5)}, "refresh_every"),
        ("tiny", {"config": PruningConfig(prune_less_factor=0.0)}, "prune_less_factor"),
        ("tiny", {"config": PruningConfig(pruning_rate=0.001)}, "no token is dropped"),
        ("tiny", {"config": "papre"}, "did you mean 'paper'"),
        ("tiny", {"batch": 0}, "batch must be at least 1"),
        ("tiny", {"steps": 0}, "steps must be at least 1"),
        ("tiny", {"repeats": 0}, "repeats must be at least 1"),
        ("tiny", {"size": (65, 64)}, "width must be a multiple of 4"),
        ("sd15", {}, "nothing to prune"),
        ("sdxxl", {}, "did you mean 'sdxl'"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_any_work(
    model: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("random_unet", "load_pipeline", "time_parts"):
        monkeypatch.setattr(latency_module, work, _never)
    with pytest.raises(ValueError, match=message):
        latency(model, **({"config": "paper"} | changes))


def test_place_changes_none_of_the_parts_so_sd15_can_be_counted() -> None:
    unet = architecture("sd15").on_meta()
    shapes = pruned_shapes(summary_of(unet, PruningConfig(place="after-self-attention")), 50)
    assert {(shape.tokens, shape.heads) for shape in shapes} == {(4096, 8), (1024, 8), (256, 8), (64, 8)}


def test_the_papers_figures() -> None:
    assert {name: sum(parts.values()) for name, parts in PAPER.items()} == {"paper": 3919, "dagger": 674}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dense", [40.0, 0.9])  # of which the second makes a run shorter than its parts
def test_chart_shows_a_report(dense: float) -> None:
    chart = np.asarray(latency_chart(report_of(TEN_EACH, dense)))
    assert chart.shape[2] == 3
    colours = {tuple(pixel) for pixel in chart[chart.shape[0] // 2, :, :3].reshape(-1, 3).tolist()}
    assert len(colours) >= len(PARTS) + 1  # the middle row crosses every part of the one bar


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(latency_command)

    def run_it(*arguments: str) -> str:
        app(["--device", "cpu", "--repeats", "1", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run_it


def test_command_prints_a_table(command: Callable[..., str], tmp_path: Path) -> None:
    plot = tmp_path / "new" / "latency.png"
    lines = command("--size", "64x64", "--pruning-rate", "0.5", "--plot", str(plot)).splitlines()
    assert lines[0].startswith("tiny, 64 x 64 pixels, batch 1 with guidance, 50 steps, shipped weights in float32")
    assert lines[1].split() == ["ms", "a", "run", "head-by-head", "all-heads", "blocked", "flash", "sampled"]
    assert [line[:8].strip() for line in lines[2:8]] == [*PARTS, "all"]
    assert lines[8] == "triton is left out: its kernels run on CUDA"
    assert lines[9].startswith("a step: dense ")
    assert lines[10] == str(plot)
    assert Image.open(plot).size[0] > 800


def test_command_prints_json_alone(command: Callable[..., str]) -> None:
    printed = json.loads(
        command(
            "--size",
            "64x64",
            "--no-guidance",
            "--dtype",
            "bfloat16",
            "--preset",
            "paper",
            "--pruning-rate",
            "0.5",
            "--json",
        )
    )
    assert printed["config"]["pruning_rate"] == 0.5
    assert (printed["guidance"], printed["dtype"], printed["config"]["where"]) == (False, "bfloat16", "everywhere")
    assert list(printed["ways"]) == list(WAYS)


def test_table_by_hand() -> None:
    lines = _table(report_of(TEN_EACH), "paper")
    assert lines[2].split() == ["get", "map", "10.0", "0.5%", "1961"]  # a dense run is 50 x 40 ms
    assert lines[7].split() == ["all", "50.0", "2.5%", "3919"]
    assert "dense 40.0 ms (39.0 to 42.0)" in lines[-1]
    assert lines[-1].endswith("a dense run 2.00 s")


def test_command_says_what_is_wrong(command: Callable[..., str]) -> None:
    for arguments, message in (
        (("--dtype", "float23"), "did you mean 'float32'"),
        (("--size", "64"), "size must be WIDTHxHEIGHT"),
        (("--preset", "papre"), "did you mean 'paper'"),
    ):
        with pytest.raises(ValueError, match=message):
            command(*arguments)
