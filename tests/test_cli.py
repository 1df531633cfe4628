"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from atedm.cli import main


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
    for command in ("generate", "accuracy", "ablate"):
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
    row = tmp_path / "rows" / "zero-padding.json"
    stored = json.loads(row.read_text())
    stored["cost"] = 0.123  # a stored row is read back, not measured again
    row.write_text(json.dumps(stored))
    assert "| zero padding | 0.123 |" in run(*command).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
