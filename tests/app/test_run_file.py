"""A run file is enough to draw a run again."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atedm.app.run_file import read_run_file
from atedm.cli import app


def atedm_(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    done = atedm_(
        "generate", "a duck", "a castle", "--method", "matched", "--budget", 0.8, "--steps", 3, "--seed", 5,
        "--size", "96x128", "--guidance", 2.5, "--compare", "--device", "cpu", "--out", made,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return made


def test_the_images_are_the_same_again(folder: Path, tmp_path: Path) -> None:
    done = atedm_("generate", "--again", folder / "run.json", "--compare", "--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    names = sorted(file.name for file in folder.glob("*.png"))
    assert names == ["comparison.png", "dense-0.png", "dense-1.png", "other-0.png", "other-1.png", "pruned-0.png",
                     "pruned-1.png"]  # fmt: skip
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    first, again = (json.loads((where / "run.json").read_text()) for where in (folder, tmp_path))
    assert first["request"] == again["request"]


@pytest.mark.parametrize(
    "extra", [("a prompt",), ("--steps", 4), ("--model", "tiny"), ("--seed", 0), ("--budget", 1), ("--rate", 0.5)]
)
def test_what_it_says_already_is_not_said_twice(folder: Path, extra: tuple[Any, ...]) -> None:
    said = str(atedm_("generate", "--again", folder / "run.json", *extra).exception)
    assert said.startswith("--again makes a run again as it was; leave out ")
    assert said.endswith(str(extra[0]) if len(extra) > 1 else "prompts")


def test_another_method_may_be_shown_beside(folder: Path, tmp_path: Path) -> None:
    run_again = ("generate", "--again", folder / "run.json", "--compare-with", "dagger", "--device", "cpu")
    done = atedm_(*run_again, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "pruned-1.png").read_bytes() == (folder / "pruned-1.png").read_bytes()
    assert (tmp_path / "other-1.png").read_bytes() != (folder / "other-1.png").read_bytes()
    other = json.loads((tmp_path / "run.json").read_text())["request"]["other"]
    assert (other["method"], other["where"]) == ("at-edm", "not-second-level")


PAPER = {"method": "at-edm"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 3}, "it names no model and request"),
        ({"request": {"prompts": ["x"]}}, "a method must be fields by name, not None"),
        ({"request": {"prompts": "x", "method": PAPER}}, "prompts must be a list"),
        ({"request": {"prompts": ["x"], "method": PAPER, "colour": 1}}, "Request has no field 'colour'; it may be"),
        ({"request": {"prompts": ["x"], "method": {"method": "tome"}}}, "method must be one of 'at-edm', 'matched'"),
        ({"request": {"prompts": ["x"], "method": PAPER | {"pruning_rate": 1}}}, "AtEdm has no field 'pruning_rate'"),
        ({"request": {"prompts": ["x"], "method": PAPER | {"rank": "mine:contrast"}}}, "rank must be"),
        ({"request": {"prompts": ["x"], "method": PAPER, "steps": "9"}}, "steps must be a whole number of at least 1"),
        ({"request": {"prompts": ["x"], "method": PAPER, "protect": 1}}, "protect must be the name of a picture"),
    ],
)
def test_what_cannot_be_made_again_is_told(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(json.loads((folder / "run.json").read_text()) | change))
    with pytest.raises(ValueError, match=said):
        read_run_file(file)


def test_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_run_file(tmp_path / "gone.json")
