"""A run file is enough to draw a run again."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atedm.cli import app
from atedm.run_file import read_run_file


def atedm_(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    done = atedm_(
        "generate", "a red circle", "a blue ring", "--preset", "matched", "--budget", 0.8, "--steps", 3, "--seed", 5,
        "--size", "96x128", "--guidance", 2.5, "--compare", "--device", "cpu", "--out", made,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return made


def test_the_images_are_the_same_again(folder: Path, tmp_path: Path) -> None:
    done = atedm_("generate", "--again", folder / "run.json", "--compare", "--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    names = sorted(file.name for file in folder.glob("*.png"))
    assert names == ["beside-0.png", "beside-1.png", "comparison.png", "dense-0.png", "dense-1.png", "pruned-0.png",
                     "pruned-1.png"]  # fmt: skip
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    first, again = (json.loads((where / "run.json").read_text()) for where in (folder, tmp_path))
    assert first["request"] == again["request"]


@pytest.mark.parametrize(
    "extra",
    [
        ("a prompt",),
        ("--steps", 4),
        ("--model", "other"),
        ("--model", "tiny"),
        ("--seed", 0),
        ("--budget", 1),
        ("--beside", "paper"),
    ],
)
def test_what_it_says_already_is_not_said_twice(folder: Path, extra: tuple[Any, ...]) -> None:
    done = atedm_("generate", "--again", folder / "run.json", *extra, *(["--compare"] if "--beside" in extra else []))
    said = str(done.exception)
    assert said.startswith("--again draws a run as it was; leave out ")
    assert said.endswith(str(extra[0]) if len(extra) > 1 else "prompts")


def test_what_was_beside_it_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    done = atedm_("generate", "--again", folder / "run.json", "--compare", "--beside", "none", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "pruned-1.png").read_bytes() == (folder / "pruned-1.png").read_bytes()
    assert not list(tmp_path.glob("beside-*"))
    assert json.loads((tmp_path / "run.json").read_text())["request"]["beside"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "it names no model and request"),
        ({"request": {"prompts": ["x"]}}, "it has no pruning config"),
        ({"request": {"prompts": "x", "config": {}}}, "prompts must be a list"),
        ({"request": {"prompts": ["x"], "config": {}, "colour": 1}}, "Request has no field 'colour'; it may be from"),
        ({"request": {"prompts": ["x"], "config": {"rate": 1}}}, "PruningConfig has no field 'rate'"),
        ({"request": {"prompts": ["x"], "config": {"ranking": "mine:contrast"}}}, "unknown ranking 'mine:contrast'"),
        ({"request": {"prompts": ["x"], "config": {}, "steps": "9"}}, "steps must be at least 1, not '9'"),
        ({"request": {"prompts": ["x"], "config": {}, "protect": 1}}, "protect must be the name of a picture"),
    ],
)
def test_what_cannot_be_drawn_again_is_told(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(json.loads((folder / "run.json").read_text()) | change))
    with pytest.raises(ValueError, match=said):
        read_run_file(file)


def test_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_run_file(tmp_path / "gone.json")
