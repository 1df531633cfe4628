"""The docs hold: the tutorial runs as written, Python blocks run, commands are understood, no link is dead."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import typer
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from nbclient import NotebookClient
from typer.testing import CliRunner

import atedm
from atedm.cli import app
from atedm.evaluation.methods_by_name import method_by_name, parse_methods
from models import sdxl_pipeline, sdxl_unet
from support import FOURTH
from test_evaluate import coco_folder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
sys.path.insert(0, str(ROOT / "docs"))

from notebook import NOTEBOOK, notebook  # noqa: E402


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# --- The tutorial -----------------------------------------------------------------------------------------------------


def test_the_notebook_is_the_tutorial() -> None:
    assert nbformat.read(NOTEBOOK, as_version=4) == notebook(), ".venv/bin/python docs/notebook.py"


def test_the_tutorial_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    read = notebook()
    NotebookClient(read, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in read.cells for output in cell.get("outputs", ()))
    assert (tmp_path / "out" / "first" / "comparison.png").exists()
    assert (tmp_path / "out" / "quality" / "report.html").exists()
    assert "11 of 11 blocks prune" in said
    assert re.search(r"0\.6 \d\d\.\d dB", said)
    assert "atedm:" not in said  # how an error begins


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Small models with random weights where a page opens one from the hub, and pictures of their size."""

    def pipeline(name: str, **parts: Any) -> Any:
        pipe = sdxl_pipeline(unet=_named(name), kind=parts.pop("kind", StableDiffusionXLPipeline), **_given(parts))
        pipe.default_sample_size = 16
        return pipe

    def controlled(name: str, **parts: Any) -> Any:
        return pipeline(name, kind=StableDiffusionXLControlNetPipeline, **parts)

    def control(name: str, **_: Any) -> Any:
        return ControlNetModel.from_unet(sdxl_unet(), conditioning_embedding_out_channels=FOURTH).eval()

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(StableDiffusionXLControlNetPipeline, "from_pretrained", controlled)
    monkeypatch.setattr(ControlNetModel, "from_pretrained", control)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return


def _named(name: str) -> Any:
    unet = sdxl_unet(transformer_layers_per_block=(1, 2, 10))  # as deep as SDXL's, so that budgets can be had
    unet.register_to_config(_name_or_path=name)
    return unet


def _given(parts: dict[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in parts.items() if key != "torch_dtype"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("stand_ins")
def test_python_blocks_run_in_their_order(page: Path, tmp_path: Path) -> None:
    if page.name == "tutorial.md":
        return  # above, in the notebook
    names: dict[str, Any] = {"pipe": StableDiffusionXLPipeline.from_pretrained("small"), "atedm": atedm}
    for code in blocks(page, "python"):
        own = re.match(r"# (\w+\.py)\n", code)
        if own:  # a file of the reader's, which blocks below import
            (tmp_path / own[1]).write_text(code)
        code = code.replace("1024, 1024", "64, 64").replace("(380, 200, 640, 520)", "(28, 20, 36, 30)")
        exec(compile(code, page.name, "exec"), names)
    assert atedm.is_applied(names["pipe"]) == (page.name == "cost.md")  # every other page leaves it as it was


# --- Commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """Every atedm command of every bash block, with its page."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in re.split(r"\n|&&|;", block):
                words = shlex.split(line.partition(" #")[0])
                words = [word for word in words if word != "do"]
                for start, word in enumerate(words):
                    if Path(word).name == "atedm":
                        found.append((page.name, words[start + 1 :]))
                        break
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "-".join(value)[:60]
)
def test_commands_are_understood(page: str, words: list[str]) -> None:
    known: Any = typer.main.get_command(app)
    words = ["sd15" if word == "$model" else "table1" if word == "$name" else word for word in words]
    name = words[0]
    with known.commands[name].make_context(name, words[1:]) as context:
        given = context.params
    assert given
    if name in {"evaluate", "bench"}:
        for spec in parse_methods(str(given["methods"])):
            if "mine:" not in spec and "cost=" not in spec:  # the reader's own file; costs take a count of SDXL
                method_by_name(spec)


def test_there_are_commands() -> None:
    assert len(commands()) > 40


SMALL = {"--captions": "2", "--repeats": "1", "--device": "cpu", "--dtype": "float32", "--workers": "1"}
"""What commands are given that take it, so that they end today on any machine."""
STEPS = 3


def made_small(words: list[str]) -> tuple[str, ...]:
    """Return a command that does the same to fewer and smaller things."""
    known: Any = typer.main.get_command(app)
    options = {option for parameter in known.commands[words[0]].params for option in parameter.opts}
    draws = words[0] not in {"cost", "scaling"}
    small = {option: value for option, value in SMALL.items() if option in options and draws}
    if "--steps" in options and draws:
        small["--steps"] = str(STEPS)
    if draws and "--model" in words:
        small["--model"] = "tiny"
    if draws and "--size" in words:
        small["--size"] = "128x128"
    if "--prompts" in words:  # whose metrics would fetch their networks
        small |= {"--clip-model": "tiny", "--fid-features": "tiny"}
    kept = list(words)
    for option in small:
        if option in kept:
            del kept[kept.index(option) : kept.index(option) + 2]
    return (*kept, *(word for pair in small.items() for word in pair))


def commands_made_small() -> list[tuple[str, ...]]:
    named = {"$model": ("sd15", "sd21", "sdxl"), "$name": ("place", "rankings", "recovery")}
    found: dict[tuple[str, ...], None] = {}
    for _, words in commands():
        meant = next((word for word in named if word in words), None)
        for name in named.get(meant or "", ("",)):
            if words[0] != "web":  # tests/test_web.py starts it
                found[made_small([name if word == meant else word for word in words])] = None
    return list(found)


@pytest.mark.skipif(
    "ATEDM_COMMANDS" not in os.environ,
    reason="every command takes half an hour; ATEDM_COMMANDS=1 runs them, as do nights",
)
@pytest.mark.parametrize("words", commands_made_small(), ids=lambda words: "-".join(words)[:80])
def test_commands_run(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = next(code for code in blocks(ROOT / "docs" / "extending.md", "python") if code.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(own)
    (tmp_path / "COCO_FOLDER").mkdir()
    coco_folder(tmp_path / "COCO_FOLDER")
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() or list(tmp_path.rglob("*.png"))


# --- The site ---------------------------------------------------------------------------------------------------------


def test_the_site_builds_and_no_link_is_dead(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "Make a diffusers pipeline prune tokens while it denoises" in page


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_the_readme_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in link or (ROOT / link).exists(), link
