"""Pipelines with a transformer in the commands: drawn, compared, counted and timed like those with a U-Net."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atedm.app.equal_cost import has_transformer, method_at
from atedm.app.models import load_pipeline, native_size
from atedm.cli import app
from atedm.method.presets import TRANSFORMER_METHODS
from atedm.web.service import Service
from transformer_support import whole_stable_diffusion_3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sd3")
    whole_stable_diffusion_3().save_pretrained(folder)
    return str(folder)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_it_is_opened_and_takes_the_methods_of_transformers(model: str) -> None:
    pipe = load_pipeline(model, device="cpu")
    assert has_transformer(pipe)
    assert native_size(pipe) == (128, 128)
    assert method_at("matched", transformer=True) == TRANSFORMER_METHODS["matched"]
    assert method_at("paper", transformer=True) == method_at("paper")


def test_generate_draws_compares_and_makes_the_run_again(model: str, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    run("generate", "a duck", "--model", model, "--steps", "2", "--compare", "--maps", "--out", str(out))
    made = json.loads((out / "run.json").read_text())
    assert made["request"]["method"] == TRANSFORMER_METHODS["matched"].as_dict()
    assert made["request"]["other"]["method"] == "at-edm"
    assert {file.name for file in out.iterdir()} >= {"dense-0.png", "pruned-0.png", "other-0.png", "maps-0.png"}
    run("generate", "--again", str(out / "run.json"), "--out", str(again))
    assert (again / "pruned-0.png").read_bytes() == (out / "pruned-0.png").read_bytes()


def test_a_budget_is_kept_and_the_cost_is_printed(model: str, tmp_path: Path) -> None:
    run("generate", "a duck", "--model", model, "--steps", "4", "--budget", "0.95", "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["cost"] == pytest.approx(0.95, abs=0.01)
    printed = run("cost", "--model", model, "--json")
    assert json.loads(printed)["tome"] == []
    assert "transformer_blocks[1:5]" in run("cost", "--model", model)


def test_methods_are_evaluated_and_timed_side_by_side(model: str, tmp_path: Path) -> None:
    common = ("--model", model, "--steps", "2")
    printed = run(
        "evaluate", "dense,matched,dense[cost=0.5]", *common, "--captions", "1", "--metrics", "distance",
        "--out", str(tmp_path / "scores"),
    )  # fmt: skip
    assert "matched" in printed
    timed = run("bench", "dense,matched,tome", *common, "--repeats", "1")
    assert "matched" in timed
    assert "tome" in timed
    refused = CliRunner().invoke(app, ["bench", "dense,deepcache", *common, "--repeats", "1"])
    assert refused.exit_code != 0


def test_the_page_offers_it(model: str, tmp_path: Path) -> None:
    service = Service((model,), tmp_path, device="cpu")
    assert "matched" in service.methods(model).values()
    request = service.request(model, "a duck", "matched", 95, 4, 3.0, 0)
    assert request.method.dense_share  # type: ignore[attr-defined]
