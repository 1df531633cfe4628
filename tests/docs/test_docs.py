"""The docs hold: the tutorial runs as written, Python blocks run, commands are understood, no link is dead."""

import ast
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
import torch
import typer
from diffusers import ControlNetModel, FluxPipeline, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from nbclient import NotebookClient
from typer.testing import CliRunner

import atedm
from atedm.cli import app
from atedm.lab.evaluation.experiments import EXPERIMENTS
from atedm.lab.methods.by_name import method_by_name, parse_methods
from coco import coco_folder
from models import sdxl_pipeline, sdxl_unet, small_unet
from support import FOURTH
from transformer_support import FLUX_TEXT, flux

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
sys.path.insert(0, str(ROOT / "docs"))

from notebook import NOTEBOOK, notebook  # noqa: E402


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


NIGHTLY = "ATEDM_COMMANDS" in os.environ


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# --- Form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_have_at_most_six_columns_and_rows_of_one_length(page: Path) -> None:
    rows = [line.strip() for line in page.read_text().splitlines()]
    for above, row in zip(["", *rows], rows, strict=False):
        if row.startswith("|"):
            assert row.count("|") - 1 <= 6, row
            assert not above.startswith("|") or row.count("|") == above.count("|"), row


def test_the_readme_is_short_and_has_what_continuous_integration_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for heading in ("### Run the tests", "### See it"):
        assert re.search(rf"^{heading}\n\n```bash\n[^\n]+\n```", text, re.MULTILINE), heading


# --- The tutorial -----------------------------------------------------------------------------------------------------


def test_the_notebook_is_the_tutorial() -> None:
    assert nbformat.read(NOTEBOOK, as_version=4) == notebook(), ".venv/bin/python docs/notebook.py"


def test_the_tutorial_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    read = notebook()
    if (
        not NIGHTLY
    ):  # ten captions show no more of the page than two, nor eight steps more than three, nor three budgets
        for cell in read.cells:
            for written, here in (
                ("--captions 10 --steps 4", "--captions 2 --steps 2"),
                ("--steps 8", "--steps 3"),
                ("steps=8", "steps=3"),
                ("(0.9, 0.75, 0.6)", "(0.6,)"),
            ):
                cell.source = cell.source.replace(written, here)
    NotebookClient(read, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in read.cells for output in cell.get("outputs", ()))
    assert (tmp_path / "out" / "first" / "comparison.png").exists()
    assert (tmp_path / "out" / "quality" / "report.html").exists()
    assert "11 of 11 blocks are pruned" in said
    assert re.search(r"0\.6 \d\d\.\d dB", said)
    assert "atedm:" not in said  # how an error begins


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Small models with random weights where a page opens one from the hub, and pictures of their size."""

    def pipeline(name: str, **parts: Any) -> Any:
        exported = request.node.callspec.params["page"].name == "export.md"  # which takes long for each block
        unet = small_unet() if exported else _named(name)
        pipe = sdxl_pipeline(unet=unet, kind=parts.pop("kind", StableDiffusionXLPipeline), **_given(parts))
        pipe.default_sample_size = 16
        return pipe

    def controlled(name: str, **parts: Any) -> Any:
        return pipeline(name, kind=StableDiffusionXLControlNetPipeline, **parts)

    def control(name: str, **_: Any) -> Any:
        return ControlNetModel.from_unet(sdxl_unet(), conditioning_embedding_out_channels=FOURTH).eval()

    def flux_pipeline(*_: Any, **__: Any) -> Any:
        pipe, _ = flux(guidance=False)
        embeds = FLUX_TEXT["prompt_embeds"]
        given = (embeds, FLUX_TEXT["pooled_prompt_embeds"], torch.zeros(embeds.shape[1], 3))
        pipe.encode_prompt = lambda **_: given
        pipe.default_sample_size = 16
        return pipe

    monkeypatch.setattr(FluxPipeline, "from_pretrained", flux_pipeline)
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(StableDiffusionXLControlNetPipeline, "from_pretrained", controlled)
    monkeypatch.setattr(ControlNetModel, "from_pretrained", control)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # as it takes long
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return


def _named(name: str) -> Any:
    unet = sdxl_unet(transformer_layers_per_block=(1, 2, 10))  # as deep as SDXL's, so that budgets can be had
    unet.register_to_config(_name_or_path=name)
    return unet


def _given(parts: dict[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in parts.items() if key != "torch_dtype"}


def _with_python(page: Path) -> bool:
    return page.name != "tutorial.md" and bool(blocks(page, "python"))  # the tutorial runs above, as a notebook


@pytest.mark.parametrize("page", filter(_with_python, PAGES), ids=name_of)
@pytest.mark.usefixtures("stand_ins")
def test_python_blocks_run_in_their_order_and_give_the_numbers_beside_them(page: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {"pipe": StableDiffusionXLPipeline.from_pretrained("small"), "atedm": atedm}
    for code in blocks(page, "py(?:thon)?" if NIGHTLY else "python"):  # what counts large models is marked py
        own = re.match(r"# (\w+\.py)\n", code)
        if own:  # a file of the reader's, which blocks below import
            (tmp_path / own[1]).write_text(code)
        if page.name != "cost.md":  # which opens no picture
            code = code.replace("1024, 1024", "64, 64").replace("(380, 200, 640, 520)", "(28, 20, 36, 30)")
        code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
        code = re.sub(r'(pipe\("[^"]*")\)', r"\1, num_inference_steps=2)", code)
        exec(compile(code, page.name, "exec"), names)
        for expression, number in re.findall(r"^(\S.*?)  # (\d+\.\d+)$", code, re.MULTILINE):
            if isinstance(ast.parse(expression).body[0], ast.Expr):
                digits = len(number.partition(".")[2])
                assert f"{eval(expression, names):.{digits}f}" == number, expression
    assert not atedm.is_applied(names["pipe"])  # every page leaves it as it was


# --- Commands ---------------------------------------------------------------------------------------------------------

EVERY = re.compile(r"for (\w+) in ([^;]+); do ")


def commands() -> list[tuple[str, list[str]]]:
    """Every atedm command of every bash block, with its page; what loops go over is the first of it."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for variable, values in EVERY.findall(block):
                block = block.replace(f"${variable}", values.split()[0])
            for line in re.split(r"\n|&&|;", EVERY.sub("", block)):
                words = shlex.split(line.partition(" #")[0])
                for start, word in enumerate(words):
                    if Path(word).name == "atedm":
                        found.append((name_of(page), words[start + 1 :]))
                        break
    return found


def command_of(words: list[str]) -> tuple[Any, str, list[str]]:
    """Return the command, its name, and what follows."""
    command: Any = typer.main.get_command(app)
    name = ""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return command, name, words


def test_there_are_commands() -> None:
    assert len(commands()) > 40


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "-".join(value)[:60]
)
def test_commands_are_understood(page: str, words: list[str]) -> None:
    command, name, rest = command_of(words)
    with command.make_context(name, list(rest)) as context:
        given = context.params
    assert given
    for spec in _methods_in(name, given):
        if (
            "mine:" not in spec and "cost=" not in spec and not spec.endswith(".json")
        ):  # the reader's own file; costs take a count of SDXL
            method_by_name(spec)


def _methods_in(name: str, given: dict[str, Any]) -> list[str]:
    """Methods that a command is given as it reads them."""
    if name in {"evaluate", "bench", "errors"} and given["methods"] is not None:
        experiment = EXPERIMENTS.get(str(given["methods"]))
        return parse_methods(str(given["methods"])) if experiment is None else [*experiment.methods.values()]
    return [str(given["method"])] if name in {"memory", "latency", "scaling"} else []


SMALL = {"--captions": "2", "--repeats": "1", "--device": "cpu", "--dtype": "float32"}
"""What commands are given that take it, so that they end today on any machine."""
STEPS = 3


def made_small(words: list[str]) -> tuple[str, ...]:
    """Return a command that does the same to fewer and smaller things."""
    command, name, _ = command_of(words)
    options = {option for parameter in command.params for option in parameter.opts}
    draws = name not in {"cost", "scaling", "memory"}
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


def _of_a_run(words: list[str]) -> bool:
    """Whether a command takes up what another one wrote, or files of the reader's."""
    return any(word in {"--again", "--plan"} or "my-" in word or word.endswith(".json") for word in words)


def commands_made_small() -> list[tuple[str, ...]]:
    given = [words for _, words in commands() if words[0] != "web" and not _of_a_run(words)]  # tests/web starts it
    return list(dict.fromkeys(made_small(words) for words in given))


@pytest.mark.skipif(not NIGHTLY, reason="every command takes half an hour; ATEDM_COMMANDS=1 runs them, as do nights")
@pytest.mark.parametrize("words", commands_made_small(), ids=lambda words: "-".join(words)[:80])
def test_commands_run(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = next(code for code in blocks(ROOT / "docs/how-to/extend.md", "python") if code.startswith("# mine.py"))
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
    page = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert "Make a diffusers pipeline prune tokens while it denoises" in page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_link_to_a_file_is_there(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", page.read_text()):
        target = page.parent / link if link else page
        assert "://" in link or target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor[1:] in _anchors(target), f"{link}{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
