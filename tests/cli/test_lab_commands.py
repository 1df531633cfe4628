"""Bench, evaluate and the commands of the laboratory as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from atedm.lab.evaluation.experiments import EXPERIMENTS

Run = Callable[..., Any]
SMALL = ("--size", "64x64", "--metrics", "distance,accuracy")


def test_help_lists_the_commands_and_the_experiments(run: Run) -> None:
    shown = run("lab", "--help").stdout
    for command in ("reproduce", "latency", "memory", "variance", "scaling", "errors", "objects", "agreement"):
        assert f" {command} " in shown
    words = run("lab", "reproduce", "--help").stdout
    assert [name for name in EXPERIMENTS if name not in words] == []


@pytest.mark.parametrize("package", ["scipy.stats", "open_clip", "psutil"])
def test_a_package_that_is_missing_is_told_before_anything_is_drawn(
    run: Run, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module("diffusers.pipelines.pipeline_utils")  # which looks for scipy itself when it is first imported
    monkeypatch.setitem(sys.modules, package, None)
    done = run("evaluate", "dense", "--captions", "2", "--steps", "1", "--size", "64x64", "--metrics", "accuracy,clip")
    assert done.returncode == 2
    name = package.partition(".")[0]
    assert f"this needs {name}: pip install 'atedm[lab]'" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.png"))


def test_charts_say_that_matplotlib_is_missing() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import atedm.lab.plotting.figure"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "this needs matplotlib: pip install 'atedm[lab]'" in done.stderr


def test_evaluate_compares_and_goes_on(run: Run, tmp_path: Path) -> None:
    command = ("evaluate", "paper,tome[ratio=0.4]", "--captions", "3", "--steps", "2", "--sheet", "3", *SMALL)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    names = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    methods = ["| dense", "| paper", "| tome[ratio=0.4]"]  # distances are to dense
    assert names == ["| method", "| ---", *methods, "| right, %", "| ---", *methods]
    folder = tmp_path / "out" / "evaluate"
    images = folder / "2-steps-guidance-3-64x64-float32" / "images"
    assert (images / "dense" / "00002.png").exists()
    assert {file.name for file in folder.glob("report*")} == {
        "report.html", "report.json", "report.md", "report.png", "report-sheet.png",
    }  # fmt: skip
    assert run(*command).stdout == done.stdout
    (images / "dense" / "settings.json").unlink()
    assert "holds images, but no settings.json" in run(*command).stderr


def test_reproduce_is_evaluate_by_a_name(run: Run, tmp_path: Path) -> None:
    done = run("lab", "reproduce", "place", "--captions", "2", "--steps", "2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "supplement C.1" in done.stdout
    assert "| after-self-attention | 0." in done.stdout
    for ending in (".json", ".md", ".png", ".html", "-sheet.png"):
        assert (tmp_path / "out" / "evaluate" / f"place-2-steps-64x64{ending}").stat().st_size > 200
    assert len(list((tmp_path / "out").rglob("images/*/00001.png"))) == 4
    assert run("evaluate", "place", "--captions", "2", "--steps", "2", *SMALL).stdout == done.stdout


def test_a_file_of_prompts_is_drawn_and_what_cannot_be_had_of_it_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("a duck\na castle\n")
    small = ("--steps", "1", "--size", "64x64", "--metrics", "fid,accuracy")
    done = run("evaluate", "dense", "--prompts", "two.txt", *small)
    assert done.returncode == 0, done.stderr
    assert "accuracy is left out" in done.stderr
    assert "fid is left out" in done.stderr
    assert len(list((tmp_path / "out").rglob("dense/*.png"))) == 2


def test_bench_shows_the_peak_where_it_was_asked_for(run: Run) -> None:
    small = ("bench", "dense", "--step", "--size", "64x64", "--repeats", "1", "--device", "cpu")
    assert "time, dense = 1 | peak of activations, MiB |" in run(*small, "--memory").stdout
    assert "MiB" not in run(*small).stdout


def test_scaling_counts_every_model_at_every_size(run: Run, tmp_path: Path) -> None:
    done = run("lab", "scaling", "--models", "tiny,sd15", "--sizes", "128,512", "--json", "--plot", "scaling.png")
    points = json.loads(done.stdout)
    again = run("lab", "scaling", "--models", "tiny,tiny,sd15", "--sizes", "512,128,512", "--json")
    assert json.loads(again.stdout) == points
    assert [(point["model"], point["side"]) for point in points] == [
        ("tiny", 128), ("tiny", 512), ("sd15", 128), ("sd15", 512),
    ]  # fmt: skip
    assert [point["attention_pruned"] is None for point in points] == [False, False, True, True]
    assert "| sd15 | 512 | 0.3" in run("lab", "scaling", "--models", "sd15", "--sizes", "512").stdout
    assert (tmp_path / "scaling.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lab", "scaling", "--sizes", "512,x"), "sizes must be whole numbers"),
        (("lab", "scaling", "--models", ","), "at least one model"),
        (("lab", "latency", "--method", "paper[rate=0]"), "there is nothing to time: at a rate of 0 no token"),
        (("lab", "latency", "--size", "64"), "size must be WIDTHxHEIGHT"),
        (("lab", "latency", "--method", "papre"), "did you mean 'paper'?"),
        (("evaluate", "papre"), "did you mean 'paper'?"),
        (("lab", "reproduce", "table2"), "unknown method 'table2'"),
        (("evaluate", "--metrics", "fit"), "did you mean 'fid'?"),
        (("evaluate", "--prompts", "gone.txt"), "no prompts at 'gone.txt'"),
        (("evaluate", "--prompts", "."), "is no folder of MS-COCO"),
        (("evaluate", "--captions", "0"), "captions must be at least 1"),
        (("evaluate", "--batch", "0"), "batch must be at least 1"),
        (("evaluate", "--seed", str(2**63)), "seed must be 0 or more and below 2^62"),
        (("evaluate", "--guidance", "1000"), "0 or more and below 1000"),
        (("evaluate", "--size", "0x0"), "sides must be from 8 to 32768 pixels"),
        (("evaluate", "dense", "--captions", "1"), "FID needs at least two images"),
        (("evaluate", "tome+dagger"), "ToMe and pruning do not go together"),
        (("bench", "--out", "a.png", "--plot", "a.png"), "named for two results"),
        (("bench", "--device", "gpu"), "unknown device"),
        (("bench", "tome[cost=matched]", "--steps", "0"), "steps must be at least 1"),
        (("lab", "errors", "paper", "--batch", "0"), "batch must be at least 1"),
        (("lab", "objects", "--rate", "0"), "for there to be dropped tokens"),
        (("lab", "agreement", "flash/7"), "only a sample has a number of rows"),
        (("lab", "variance", "--steps", "0"), "steps must be at least 1"),
        (("lab", "memory", "paper", "--model", "sdlx"), "did you mean 'sdxl'?"),
    ],
)
def test_what_the_user_got_wrong_ends_in_one_line_and_status_2(
    refused: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(*arguments)


def test_a_choice_that_there_is_not_is_refused_with_those_there_are(run: Run) -> None:
    done = run("lab", "latency", "--dtype", "int8")
    assert done.returncode == 2
    assert "bfloat16" in done.stderr
