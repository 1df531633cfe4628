"""Generate, web and cost as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import atedm
from atedm.cli.options import MethodName
from atedm.tiny import weights_folder
from models import sdxl_pipeline, sdxl_unet

Run = Callable[..., Any]


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    shown = subprocess.run([sys.executable, "-m", "atedm", "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    for command in ("generate", "web", "cost", "bench", "evaluate", "tune", "fit", "finetune", "lab"):
        assert f" {command} " in shown.stdout
    heavy = ("torch", "diffusers", "matplotlib", "gradio", "PIL")
    code = f"import sys, atedm.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == atedm.__version__


def test_every_method_can_be_named() -> None:
    assert [name.value for name in MethodName] == [*atedm.METHODS]


def test_generate_writes_what_it_says(run: Run, tmp_path: Path) -> None:
    done = run(
        "generate", "a butterfly above a rose", "--steps", "3", "--rate", "0.5", "--size", "96x128",
        "--compare", "--maps", "--out", "pictures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    request = json.loads((tmp_path / "pictures" / "run.json").read_text())["request"]
    assert (request["method"]["method"], request["method"]["rate"], request["width"]) == ("matched", 0.5, 96)
    assert request["other"]["method"] == "at-edm"
    for name in ("pruned-0.png", "other-0.png", "comparison.png"):
        assert f"pictures/{name}" in done.stdout.replace("\\", "/")
    assert (tmp_path / "pictures" / "comparison.png").stat().st_size > 1000


def test_generate_keeps_to_a_budget(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a duck", "--budget", "0.92", "--method", "paper", "--steps", "2", "--size", "160x128")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "run.json").read_text())
    method = atedm.AtEdm(rate=made["request"]["method"]["rate"])
    figures = atedm.cost("tiny", method, size=(160, 128), steps=2).figures()
    assert 0.91 < figures.mean / figures.dense <= 0.92
    assert made["cost"] == pytest.approx(figures.mean / figures.dense, abs=1e-4)


def test_cost_prints_json_and_nothing_else(run: Run) -> None:
    content = json.loads(run("cost", "--method", "paper", "--tome-ratio", "0.6", "--json").stdout)
    assert content["unit"] == "TMAC"
    assert round(content["convention"]["paper"]["normal_step"], 3) == 4.049
    tome = {(row["merge"], row["levels"]): row for row in content["tome"]}
    assert len(tome) == 4
    assert round(tome["everything", "all"]["paper"]["mean"], 3) == 3.563


def test_cost_shows_tables_and_draws(run: Run, tmp_path: Path) -> None:
    done = run("cost", "--model", "tiny", "--budget", "0.9", "--batch", "2", "--no-guidance", "--plot", "a/cost.png")
    assert done.returncode == 0, done.stderr
    for part in (
        "tiny, 256 x 256 px, batch 2 without guidance; 20 steps, 0 of them early; Matched pruning, rate 0.",
        "| Matched pruning, exact | 15.720 | 14.",
        "| ToMe 50%, all parts, all levels |",
        "| up_blocks.1.attentions.2 |",
        "a cost of 89.9%",
    ):
        assert part in done.stdout
    assert (tmp_path / "a" / "cost.png").stat().st_size > 1000


def test_a_block_that_early_steps_spare_is_marked(run: Run) -> None:
    assert ", early all |" in run("cost", "--model", "tiny", "--method", "paper").stdout


def test_blocks_of_one_layer_are_counted_with_the_method_that_suits(run: Run) -> None:
    assert "sd15, 512 x 512 px, batch 1 with guidance" in run("cost", "--model", "sd15").stdout


def test_a_folder_in_brackets_is_called_by_its_name(run: Run, tmp_path: Path) -> None:
    for name in ("m[v2]", "[red]q", "long" * 30):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((weights_folder() / "unet" / "config.json").read_text())
        shown = run("cost", "--model", f"./{name}", "--size", "128x128")
        assert shown.returncode == 0, shown.stderr
        assert name in shown.stdout


def test_what_takes_more_memory_than_there_is_ends_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr("atedm.app.generate.generate", too_large)
    done = run("generate", "x", "--steps", "1")
    assert done.returncode == 2
    assert "more memory than there is" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", " "), "prompt is empty"),
        (("generate", "x", "--budget", "0.1"), "pruning reaches down to"),
        (("generate", "x", "--budget", "0.9", "--rate", "0.5"), "--budget or --rate, not both"),
        (("generate", "x", "--rate", "1"), "rate must be in [0, 1)"),
        (("generate", "x", "--guidance", "nan"), "guidance must be 0 or more and below 1000, not nan"),
        (("generate", "x", "--steps", "0"), "steps must be at least 1"),
        (("generate", "x", "--size", "128"), "size must be WIDTHxHEIGHT"),
        (("generate", "x", "--size", "100x100"), "multiple of 8"),
        (("generate", "x", "--size", "800000x800000"), "sides must be from 8 to 32768 pixels"),
        (("generate", "x", "--protect", "gone.png"), "gone.png"),
        (("generate", "x", "--model", "./nowhere"), "no model at './nowhere'"),
        (("generate", "x", "--model", "."), "no model_index.json"),
        (("generate", "x", "--model", "gone.safetensors"), "no model file at"),
        (("generate", "x", "--model", "old.ckpt"), "convert it to .safetensors"),
        (("generate", "x", "--model", "foo[/bar]"), "cannot open the model 'foo[/bar]'"),
        (("generate", "x", "--model", ""), "the name of the model is empty"),
        (("generate", "x", "--model", "~/nowhere/at/all"), "/nowhere/at/all"),
        (("generate", "x", "--device", "meta"), "there is no device 'meta'"),
        (("generate", "x", "--device", "gpu"), "unknown device 'gpu'; give cuda, mps or cpu"),
        (("generate", "x", "--device", "mps" if torch.cuda.is_available() else "cuda"), "there is no device"),
        (("cost", "--model", "sdlx"), "did you mean 'sdxl'?"),
        (("cost", "--model", "./nowhere"), "no folder './nowhere'"),
        (("cost", "--model", "sd15", "--method", "paper"), "nothing to prune"),
        (("cost", "--model", "tiny", "--budget", "0.7", "--steps", "0"), "steps must be at least 1"),
        (("cost", "--model", "tiny", "--budget", "0.1"), "pruning reaches down to"),
        (("cost", "--batch", "0"), "batch must be at least 1"),
        (("cost", "--size", "1000x1001"), "height must be a multiple of 8 pixels"),
        (("cost", "--size", "big"), "size must be WIDTHxHEIGHT"),
        (("cost", "--budget", "0.6", "--rate", "0.5"), "--budget or --rate, not both"),
        (("cost", "--tome-ratio", "0.8"), "ratio must be from 0 to 0.75"),
        (("web", "--password", " "), "the password is empty"),
        (("web", "--host", "::1"), "is an address of IPv6"),
        (("web", "--host", "not.an.address.invalid"), "give another --host"),
    ],
)
def test_what_the_user_got_wrong_ends_in_one_line_and_status_2(
    refused: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(*arguments)


def test_a_name_that_is_no_choice_is_told_with_the_choices(run: Run) -> None:
    done = run("generate", "x", "--method", "papre")
    assert done.returncode == 2
    assert "'papre' is not one of" in done.stderr.replace("│", " ")


def test_tune_finds_a_plan_that_generate_and_evaluate_take(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a duck\na castle\n")
    sdxl_pipeline(unet=sdxl_unet(layers_per_block=2)).save_pretrained(tmp_path / "model")
    done = run(
        "tune", "model", "--budget", "0.6", "--of", "arithmetic", "--steps", "4", "--prompts", "mine.txt", "--images",
        "10", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = tmp_path / "out" / "tune" / "plan.json"
    assert "out/tune/plan.json: " in done.stdout.replace("\\", "/")
    assert (tmp_path / "out" / "tune" / "plan.html").exists()
    found = json.loads(plan.read_text())
    assert found["found"]["prompts"] == 2
    done = run(
        "generate", "a duck", "--model", "model", "--plan", str(plan), "--compare", "--device", "cpu", "--out",
        "by-plan",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "by-plan" / "run.json").read_text())
    assert made["request"]["steps"] == found["steps"]
    assert made["request"]["plan"]["method"] == found["method"]
    done = run("generate", "--again", "by-plan/run.json", "--device", "cpu", "--out", "again")
    assert done.returncode == 0, done.stderr
    pruned = [(tmp_path / name / "pruned-0.png").read_bytes() for name in ("by-plan", "again")]
    assert pruned[0] == pruned[1]
    done = run(
        "evaluate", str(plan), "--model", "model", "--prompts", "mine.txt", "--captions", "2",
        "--steps", "4", "--metrics", "distance", "--device", "cpu", "--out",
        "judged",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "plan.json" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune", "tiny", "--budget", "1.5"), "budget must be above 0 and below 1"),
        (("tune", "tiny", "--prompts", "none.txt"), "no prompts at 'none.txt'"),
        (("generate", "a", "--plan", "none.json"), "no plan at 'none.json'"),
        (("generate", "a", "--plan", "none.json", "--rate", "0.5"), "leave out --rate"),
        (("evaluate", "none.json"), "no plan at 'none.json'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert said in done.stderr.strip().splitlines()[-1]
