"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import atedm
from atedm import PruningConfig
from atedm.cli import main
from atedm.evaluation.experiments import EXPERIMENTS
from atedm.pipelines import tiny_folder


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder, as its script would."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["atedm", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return command


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    shown = subprocess.run([sys.executable, "-m", "atedm", "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    for command in (
        "generate",
        "cost",
        "scaling",
        "latency",
        "variance",
        "evaluate",
        "reproduce",
        "accuracy",
        "ablate",
    ):
        assert command in shown.stdout
    code = "import sys, atedm.cli; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == "0.1.0"


def test_generate_writes_what_it_says(run: Run, tmp_path: Path) -> None:
    done = run(
        "generate", "a red circle above a blue square", "--steps", "3", "--pruning-rate", "0.5", "--size", "96x128",
        "--compare", "--maps", "--out", "pictures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "pictures" / "run.json").read_text())
    assert made["request"]["config"]["pruning_rate"] == 0.5
    assert made["request"]["width"] == 96
    assert "pictures/comparison.png" in done.stdout.replace("\\", "/")
    assert (tmp_path / "pictures" / "comparison.png").stat().st_size > 1000


def test_accuracy_prints_every_attribute(run: Run, tmp_path: Path) -> None:
    done = run("accuracy", "--captions", "4", "--steps", "3", "--sheet", "sheet.png", "--preset", "paper")
    assert done.returncode == 0, done.stderr
    for name in ("count", "colour", "shape", "relation", "background", "texture", "all"):
        assert f"\n{name} " in f"\n{done.stdout}"
    assert (tmp_path / "sheet.png").exists()


def test_ablate_measures_rows_keeps_them_and_goes_on(run: Run, tmp_path: Path) -> None:
    command = ("ablate", "--captions", "3", "--steps", "3", "--only", "zero padding", "--out", "rows")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "| dense | 1.000 |" in done.stdout
    assert "| zero padding | 0." in done.stdout
    (row,) = (tmp_path / "rows").glob("zero-padding-*.json")
    stored = json.loads(row.read_text())
    stored["cost"] = 0.123  # a stored row is read back, not measured again
    row.write_text(json.dumps(stored))
    assert "| zero padding | 0.123 |" in run(*command).stdout
    other = run("ablate", "--captions", "2", "--steps", "3", "--only", "direct copy", "--out", "rows")
    assert other.returncode == 0, other.stderr
    assert "| zero padding | 0.123 |" in run(*command).stdout  # and a run under other settings takes no row's place
    assert not (tmp_path / "rows" / "table.md").exists()  # which is the whole table or none


def test_cost_prints_json_and_nothing_else(run: Run) -> None:
    content = json.loads(run("cost", "--json").stdout)
    assert content["unit"] == "TMAC"
    assert round(content["convention"]["paper"]["normal_step"], 3) == 4.049
    assert content["memory"]["dense"]["peak_gib"] > content["memory"]["dense"]["average_gib"] > 0
    assert {(row["merge"], row["levels"]) for row in content["tome"]} == {
        (merge, levels) for merge in ("everything", "self-attention") for levels in ("all", "highest")
    }
    tome = json.loads(run("cost", "--method", "tome", "--ratio", "0.6", "--json").stdout)
    assert round(tome["convention"]["paper"]["mean"], 3) == 3.563
    assert tome.keys() == content.keys()


def test_cost_shows_tables_and_draws(run: Run, tmp_path: Path) -> None:
    done = run("cost", "--model", "tiny", "--budget", "0.9", "--batch", "2", "--no-guidance", "--plot", "a/cost.png")
    assert done.returncode == 0, done.stderr
    for part in ("tiny, 128 x 128 px, batch 2 without guidance", "AT-EDM, exact", "ToMe SA+CA+FF, all levels"):
        assert part in done.stdout
    for part in ("up_blocks.1.attentions.2", "average over the step", "More jobs in the same memory"):
        assert part in done.stdout
    assert (tmp_path / "a" / "cost.png").stat().st_size > 1000


def test_cost_measures_memory_on_the_device_at_hand(run: Run) -> None:
    done = run("cost", "--model", "tiny", "--memory", "measured", "--dtype", "float32", "--json")
    assert json.loads(done.stdout)["memory"]["dense"]["basis"].startswith("measured on ")
    assert json.loads(run("cost", "--model", "tiny", "--memory", "none", "--json").stdout)["memory"] is None


def test_scaling_counts_every_model_at_every_size(run: Run, tmp_path: Path) -> None:
    done = run("scaling", "--models", "tiny,sd15", "--sizes", "128,512", "--json", "--plot", "scaling.png")
    points = json.loads(done.stdout)
    again = run("scaling", "--models", "tiny,tiny,sd15", "--sizes", "512,128,512", "--json")
    assert json.loads(again.stdout) == points
    assert [(point["model"], point["side"]) for point in points] == [
        ("tiny", 128), ("tiny", 512), ("sd15", 128), ("sd15", 512),
    ]  # fmt: skip
    assert [point["attention_pruned"] is None for point in points] == [False, False, True, True]
    assert "48%" in run("scaling", "--models", "sd15", "--sizes", "512").stdout
    assert (tmp_path / "scaling.png").exists()


def test_evaluate_compares_and_goes_on(run: Run, tmp_path: Path) -> None:
    command = ("evaluate", "paper,tome[ratio=0.4]", "--captions", "3", "--steps", "2", "--metrics", "distance,accuracy")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    names = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert names == ["| method", "| dense", "| paper", "| tome[ratio=0.4]"]  # distances are to dense
    folder = tmp_path / "out" / "evaluate"
    for file in ("results.json", "report.html", "sheet.png", "images/dense/00002.png"):
        assert (folder / file).exists()
    assert run(*command).stdout == done.stdout
    assert "holds images of another drawing" in run(*command, "--guidance", "5").stderr


def test_a_metric_whose_package_is_missing_is_told_before_anything_is_drawn(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atedm.cli.evaluation_options.find_spec", lambda name: None)
    done = run("evaluate", "--captions", "2", "--steps", "2")
    assert done.returncode == 2
    assert "clip needs open_clip: pip install 'atedm[lab]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_reproduce_writes_numbers_a_plot_and_pictures(run: Run, tmp_path: Path) -> None:
    done = run("reproduce", "place", "--captions", "2", "--steps", "2", "--metrics", "distance,accuracy")
    assert done.returncode == 0, done.stderr
    assert "supplement C.1" in done.stdout
    assert "| after-self-attention | 0." in done.stdout
    for file in ("place-2-steps.json", "place-2-steps.md", "place-2-steps.png", "place-2-steps-sheet.png"):
        assert (tmp_path / "out" / "reproduce" / file).stat().st_size > 200
    kept = tmp_path / "out" / "reproduce" / "2-steps-guidance-3-float32" / "images"
    assert len(list(kept.glob("*/00001.png"))) == 4
    done = run("reproduce", "place", "--captions", "2", "--steps", "2", "--metrics", "")
    assert done.returncode == 0, done.stderr
    assert not (
        tmp_path / "out" / "reproduce" / "place-2-steps.png"
    ).exists()  # nothing to chart, and no chart of before


def test_reproduce_says_what_there_is_and_takes_what_a_file_holds(run: Run, tmp_path: Path) -> None:
    shown = run("reproduce", "--help").stdout
    assert [name for name in EXPERIMENTS if name not in shown] == []
    (tmp_path / "two.txt").write_text("a red circle\na blue ring\n")
    done = run("reproduce", "place", "--prompts", "two.txt", "--steps", "1", "--metrics", "distance")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").rglob("dense/*.png"))) == 2


def test_a_folder_in_brackets_is_called_by_its_name(run: Run, tmp_path: Path) -> None:
    for name in ("m[v2]", "[red]q", "long" * 30):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny_folder() / "unet" / "config.json").read_text())
        shown = run("cost", "--model", f"./{name}", "--size", "128x128", "--memory", "none")
        assert shown.returncode == 0, shown.stderr
        assert name in shown.stdout.replace("\n", "")
        shown = run("scaling", "--models", f"./{name}", "--sizes", "128")
        assert shown.returncode == 0, shown.stderr
        assert " 128 " in shown.stdout
        assert "%" in shown.stdout


def test_what_takes_more_memory_than_there_is_ends_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        torch.empty(2**50)

    monkeypatch.setattr("atedm.generate.generate", too_large)
    done = run("generate", "x", "--steps", "1")
    assert done.returncode == 2
    assert "more memory than there is" in done.stderr.splitlines()[-1]


def test_metrics_that_cannot_be_had_of_these_prompts_are_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    done = run("evaluate", "dense", "--prompts", "prompts.txt", "--steps", "1", "--metrics", "fid,accuracy")
    assert done.returncode == 0, done.stderr
    assert "accuracy is left out" in done.stderr
    assert "fid is left out" in done.stderr


def test_generate_keeps_to_a_budget(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a red circle", "--budget", "0.92", "--preset", "paper", "--steps", "2", "--size", "160x128")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "run.json").read_text())
    config = PruningConfig(pruning_rate=made["request"]["config"]["pruning_rate"])
    figures = atedm.cost("tiny", config, size=(160, 128), steps=2).figures()
    assert 0.91 < figures.mean / figures.dense <= 0.92


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--budget", "0.1"), "pruning reaches down to"),
        (("generate", "x", "--budget", "0.9", "--pruning-rate", "0.5"), "--budget or --pruning-rate, not both"),
        (("cost", "--model", "sdlx"), "did you mean 'sdxl'?"),
        (("cost", "--model", "./nowhere"), "no folder './nowhere'"),
        (("cost", "--size", "1000x1001"), "height must be a multiple of 8 pixels"),
        (("cost", "--size", "big"), "size must be WIDTHxHEIGHT"),
        (("cost", "--tmacs", "2.9", "--convention", "paper"), "pruning reaches down to 3.081, 45.8%"),
        (("cost", "--budget", "0.6", "--tmacs", "4"), "one of the two"),
        (("cost", "--method", "deepcache"), "unknown method"),
        (("cost", "--method", "tome", "--ratio", "0.8"), "ratio must be from 0 to 0.75"),
        (("cost", "--memory", "guessed"), "unknown memory"),
        (("scaling", "--sizes", "512,x"), "sizes must be whole numbers"),
        (("scaling", "--models", ","), "at least one model"),
        (("latency", "--pruning-rate", "0"), "there is nothing to time: at a pruning_rate of 0.0 no token is dropped"),
        (("latency", "--dtype", "int8"), "unknown dtype"),
        (("evaluate", "papre"), "did you mean 'paper'?"),
        (("evaluate", "--metrics", "fit"), "did you mean 'fid'?"),
        (("evaluate", "--prompts", "gone.txt"), "no prompts at 'gone.txt'"),
        (("evaluate", "--prompts", "."), "is no folder of MS-COCO"),
        (("evaluate", "--captions", "0"), "captions must be at least 1"),
        (("evaluate", "--batch", "0"), "batch must be at least 1"),
        (("reproduce", "table2"), "did you mean 'table1'?"),
        (("variance", "--steps", "0"), "steps must be at least 1"),
        (("generate", "x", "--pruning-rate", "1"), "pruning_rate must be in [0, 1)"),
        (("generate", "x", "--preset", "papre"), "did you mean 'paper'?"),
        (("generate", "x", "--size", "128"), "size must be WIDTHxHEIGHT"),
        (("generate", "x", "--size", "100x100"), "multiple of 8"),
        (("generate", "x", "--model", "./nowhere"), "no model at './nowhere'"),
        (("generate", "x", "--model", "."), "no model_index.json"),
        (("generate", "x", "--model", "gone.safetensors"), "no model file at"),
        (("generate", "x", "--model", "old.ckpt"), "convert it to .safetensors"),
        (("generate", " "), "prompt is empty"),
        (("ablate", "--only", "zero pading"), "did you mean 'zero padding'?"),
        (("ablate", "--captions", "0"), "captions must be at least 1"),
        (("ablate", "--workers", "0"), "workers must be at least 1"),
        (("ablate", "--guidance", "nan"), "guidance must be 0 or more and below 1000, not nan"),
        (("accuracy", "--guidance", "-5"), "guidance must be 0 or more and below 1000, not -5.0"),
        (("accuracy", "--seed", "-1"), "seed must be 0 or more"),
        (("evaluate", "--seed", str(2**63)), "seed must be 0 or more and below 2^62"),
        (("evaluate", "--guidance", "1000"), "0 or more and below 1000"),
        (("evaluate", "--size", "0x0"), "sides must be from 8 to 32768 pixels"),
        (("evaluate", "dense", "--captions", "1"), "FID needs at least two images"),
        (("evaluate", "deepcache+dagger"), "deepcache comes last in a stack"),
        (("evaluate", "paper+matched"), "two methods of one kind do not stack"),
        (("evaluate", "tome+dagger"), "ToMe and pruning do not go together"),
        (("evaluate", "paper[pruning_rate=0.3,cost=0.8]"), "give pruning_rate or cost in"),
        (("evaluate", "tome[ratio=0.2,cost=paper]"), "give ratio or cost in"),
        (("evaluate", "paper[cost=deepcache]"), "a share of dense, or the name of a way to prune or of tome"),
        (("generate", "x", "--device", "meta"), "there is no device 'meta'"),
        (("bench", "--out", "a.png", "--plot", "a.png"), "named for two results"),
        (("evaluate", "paper[pruning_rate=0.5,pruning_rate=0.2]"), "pruning_rate is given twice"),
        (("generate", "x", "--size", "800000x800000"), "sides must be from 8 to 32768 pixels"),
        (("generate", "x", "--device", "gpu"), "unknown device 'gpu'; give cuda, mps or cpu"),
        (("generate", "x", "--device", "mps" if torch.cuda.is_available() else "cuda"), "there is no device"),
        (("generate", "x", "--model", "foo[/bar]"), "cannot open the model 'foo[/bar]'"),
        (("generate", "x", "--model", ""), "the name of the model is empty"),
        (("generate", "x", "--model", "~/nowhere/at/all"), "/nowhere/at/all"),
        (("generate", "x", "--beside", "paper"), "give --compare too"),
        (("bench", "--device", "gpu"), "unknown device"),
        (("bench", "tome[cost=matched]", "--steps", "0"), "steps must be at least 1"),
        (("errors", "paper", "--batch", "0"), "batch must be at least 1"),
        (("errors", "paper", "--steps", "0"), "steps must be at least 1"),
        (("objects", "--pruning-rate", "0"), "for there to be dropped tokens"),
        (("agreement", "--pruning-rate", "0"), "for there to be dropped tokens"),
        (("agreement", "flash/7"), "only a sample has a number of rows"),
        (("cost", "--model", "tiny", "--budget", "0.7", "--steps", "0"), "steps must be at least 1"),
        (("cost", "--of", "median"), "unknown of"),
        (("cost", "--convention", "loose"), "unknown convention"),
        (("cost", "--tmacs", "4", "--pruning-rate", "0.1"), "--tmacs or --pruning-rate, not both"),
        (
            ("cost", "--method", "tome", "--pruning-rate", "0.3", "--preset", "paper"),
            "ToMe has no --preset, --pruning-rate",
        ),
        (("web", "--password", " "), "the password is empty"),
        (("web", "--host", "::1"), "is an address of IPv6"),
        (("web", "--host", "not.an.address.invalid"), "give another --host"),
    ],
)
def test_what_the_user_got_wrong_ends_in_one_line_and_status_2(
    run: Run, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("atedm: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.png"))
