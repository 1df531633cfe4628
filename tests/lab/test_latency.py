"""Time of the parts of AT-EDM. Nothing here looks at how long anything took, only at what was timed and summed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import atedm
from atedm import METHODS, AtEdm, Early
from atedm.app.devices import processor_of
from atedm.cli import app
from atedm.hosts.attention import queries_and_keys
from atedm.hosts.unet_spans import find_spans
from atedm.lab.charts.times import latency_chart
from atedm.lab.probes import latency as latency_module
from atedm.lab.probes.latency import PAPER, PARTS, WAYS, LatencyReport, latency, prune_once, pruned_shapes, why_not
from atedm.lab.setup import Setup
from atedm.lab.timing import Spread
from atedm.method.contract import Place, View
from models import run, sdxl_unet, small_unet, watched

PLACE = Place("down", 3, 0, 2, 3, "x")
HERE = [way for way in WAYS if way != "triton"]
SMALL = ["--device", "cpu", "--repeats", "1", "--size", "64x64"]


def setup_of(unet: Any, tmp_path: Path, **options: Any) -> Setup:
    unet.save_config(tmp_path / "unet")
    return Setup.of(str(tmp_path), device="cpu", **options)


def report_of(dense: float = 40.0) -> LatencyReport:
    setup = Setup.of("sdxl", device="cpu", dtype="bfloat16")
    ways = {"head-by-head": dict.fromkeys(PARTS, 10.0)}
    step = Spread(dense, dense - 1, dense + 2)
    return LatencyReport(setup, {}, 50, step, (), ways, {"all-heads": "too large"})


# --- the parts are what the method does -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way != "sampled"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_parts_give_what_the_method_gives(way: str, iterations: int) -> None:
    layer = sdxl_unet().down_blocks[2].attentions[0].transformer_blocks[0]
    tokens = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))

    def attention() -> Any:
        return queries_and_keys(layer.attn1, layer.norm1, tokens)

    with torch.no_grad():
        cut = AtEdm(iterations=iterations).drop(View(PLACE, (4, 4), 6, 0, tokens, attention, attention))
        importance, keep, kept, refilled = prune_once(layer, tokens, PLACE, 6, iterations, way, lambda part: None)
        filled = cut.refill(cut.tokens)
    torch.testing.assert_close(importance, cut.importance, rtol=1e-4, atol=1e-8)
    assert torch.equal(keep, cut.keep)
    assert torch.equal(kept, cut.tokens)
    assert torch.equal(refilled, filled)


@pytest.mark.parametrize("way", WAYS)
def test_every_part_is_lapped_once_it_is_done(way: str) -> None:
    layer = small_unet().down_blocks[1].attentions[0].transformer_blocks[0]
    laps: list[str] = []
    prune_once(layer, torch.randn(1, 16, 32), PLACE, 6, 3, way, laps.append)
    assert list(dict.fromkeys(laps)) == list(PARTS)
    assert laps[-3:] == ["mask", "drop", "fill"]
    # Once a head; or once to have the maps of all, and once to be rid of them.
    assert laps.count("get map") == {"head-by-head": layer.attn1.heads, "all-heads": 2}.get(way, 1)


def test_head_by_head_never_holds_two_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    real = latency_module.maps_in_turn

    def note(a: torch.Tensor) -> torch.Tensor:
        places.append(a.data_ptr())
        return a

    monkeypatch.setattr(latency_module, "maps_in_turn", lambda *attention: map(note, real(*attention)))
    layer = sdxl_unet().down_blocks[2].attentions[0].transformer_blocks[0]
    prune_once(layer, torch.randn(1, 16, 48), PLACE, 6, 3, "head-by-head", lambda part: None)
    assert len(places) == 3
    assert len(set(places)) == 1


# --- how often they are done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Level 2: 2 down and 3 up blocks; level 3: 2 down, 3 up and the middle. One a stage is spared in 15 steps.
        ("paper", {(64, 24, 32, 2): 5 * 50 - 2 * 15, (16, 6, 48, 3): 6 * 50 - 2 * 15}),
        ("dagger", {(16, 6, 48, 3): 6 * 50 - 2 * 15}),
        ("turbo", {(16, 6, 48, 3): 6 * 50}),
    ],
)
def test_blocks_times_steps_by_hand(name: str, expected: dict[tuple[int, ...], int], tmp_path: Path) -> None:
    method = METHODS[name]
    assert isinstance(method, AtEdm)
    shapes = pruned_shapes(setup_of(sdxl_unet(), tmp_path, size=(128, 128)), method, 50)
    assert {(s.tokens, s.kept, s.channels, s.heads): s.times for s in shapes} == expected


@pytest.mark.parametrize("spare", [Early(), Early(0.6, "L-L"), None], ids=str)
def test_blocks_times_steps_as_a_run_of_the_method_has_them(spare: Early | None, tmp_path: Path) -> None:
    unet, method = small_unet(), AtEdm(spare=spare)
    timesteps = torch.linspace(999, 0, 10)
    with atedm.pruned(unet, method), watched(unet) as calls:
        for timestep in timesteps:
            run(unet, timestep)
    done = Counter(block for call in calls for block in call.kept)
    shapes = {find_spans(unet)[name][0].level for name in done}
    found = pruned_shapes(setup_of(unet, tmp_path, size=(128, 128)), method, len(timesteps))
    assert len(found) == len(shapes)
    assert sum(shape.times for shape in found) == sum(done.values())


def test_medians_without_the_first_round_times_how_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class ScriptedWatch:
        """A stopwatch whose every lap takes what the script says for its round."""

        def __init__(self, device: torch.device) -> None:
            self.total: Counter[str] = Counter()

        def lap(self, name: str) -> None:
            self.total[name] += {0: 1000, 1: 1, 2: 9, 3: 2}[len(told)] * (5 if name == "fill" else 1)

        def read(self) -> dict[str, float]:
            return dict(self.total)

    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(latency_module, "Stopwatch", ScriptedWatch)
    setup = setup_of(sdxl_unet(), tmp_path, size=(128, 128), repeats=3)
    report = latency(setup, AtEdm(), 50, lambda *at: told.append(at))
    assert told == [("rounds", done, 4) for done in (1, 2, 3, 4)]
    assert report.ways["all-heads"] == {"get map": 1960, "rank": 980, "mask": 980, "drop": 980, "fill": 4900}
    assert report.ways["head-by-head"]["get map"] == 220 * 4 + 270 * 6  # a lap a head
    assert report.dense_step == (2, 1, 9)
    assert list(report.ways) == HERE


# --- the report -------------------------------------------------------------------------------------------------------


def test_ways_are_left_out_that_do_not_run_here() -> None:
    unet = small_unet()
    shape = replace(pruned_shapes(Setup.of("tiny"), AtEdm(), 1)[0], tokens=2**16, heads=10)
    assert why_not("triton", [shape], 2, unet) == "its kernels run on CUDA"
    assert why_not("all-heads", [shape], 2, unet) == "the maps of all heads take 640.0 GiB"
    assert why_not("head-by-head", [shape], 2, unet) == ""
    assert why_not("all-heads", [replace(shape, tokens=64)], 2, unet) == ""


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (AtEdm(rank=lambda view: view.tokens[..., 0]), {}, "not those of"),
        (METHODS["matched"], {}, "not those of"),
        (AtEdm(rate=0.0003), {}, "no token is dropped"),
        (AtEdm(), {"steps": 0}, "steps must be"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_any_work(
    method: Any, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(latency_module, "random_unet")
    with pytest.raises(ValueError, match=message):
        latency(Setup.of("tiny"), method, **changes)
    with pytest.raises(ValueError, match="nothing to prune"):
        latency(Setup.of("sd15"), AtEdm())


def test_the_papers_figures() -> None:
    assert {name: sum(parts.values()) for name, parts in PAPER.items()} == {"paper": 3919, "dagger": 674}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dense", [40.0, 0.9])  # of which the second makes a run shorter than its parts
def test_chart_shows_a_report(dense: float) -> None:
    chart = np.asarray(latency_chart(report_of(dense)))
    colours = {tuple(pixel) for pixel in chart[chart.shape[0] // 2, :, :3].reshape(-1, 3).tolist()}
    assert len(colours) >= len(PARTS) + 1  # the middle row crosses every part of the one bar


def test_table_by_hand() -> None:
    lines = report_of().text("paper").splitlines()
    assert lines[0].startswith("50 steps of sdxl, 1024 x 1024 pixels, batch 1 with guidance, bfloat16")
    assert processor_of("cpu") in lines[0]
    assert lines[2] == "| ms a run | head-by-head | paper, one A100 |"
    assert lines[4] == "| get map | 10.0 (0.5%) | 1961 |"  # a dense run is 50 x 40 ms
    assert lines[9] == "| all | 50.0 (2.5%) | 3919 |"
    assert lines[-2] == "all-heads is left out: too large"
    assert lines[-1] == "a dense step: 40.0 (39.0 to 42.0) ms; a dense run: 2.00 s"


@pytest.fixture
def command() -> Callable[..., str]:
    def run_it(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["lab", "latency", *SMALL, *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    return run_it


def test_command_prints_a_table_and_draws(command: Callable[..., str], tmp_path: Path) -> None:
    plot = tmp_path / "new" / "latency.png"
    lines = command("--method", "paper[rate=0.5]", "--plot", str(plot)).splitlines()
    assert lines[2] == f"| ms a run | {' | '.join(HERE)} |"
    assert [line.split(" | ")[0] for line in lines[4:10]] == [f"| {part}" for part in (*PARTS, "all")]
    assert lines[-1] == str(plot)
    assert Image.open(plot).size[0] > 800


def test_command_prints_json_alone(command: Callable[..., str]) -> None:
    printed = json.loads(command("--no-guidance", "--dtype", "bfloat16", "--method", "dagger", "--json"))
    assert printed["method"]["where"] == "not-second-level"
    assert (printed["setup"]["guidance"], printed["setup"]["dtype"]) == (False, "bfloat16")
    assert list(printed["ways"]) == HERE
    assert printed["dense_run"] == 20 * printed["dense_step"][0]
