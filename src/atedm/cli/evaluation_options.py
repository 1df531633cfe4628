"""Options that `atedm evaluate` and `atedm reproduce` share, and what they open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from atedm.cli.options import at_least_one, checked_guidance, checked_seed, parse_size

if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.console import Console

    from atedm.evaluation.evaluate import Progress
    from atedm.evaluation.images import Drawing
    from atedm.evaluation.prompts import Prompt
    from atedm.evaluation.scores import Metrics

METRICS_PANEL, IMAGES_PANEL = "Metrics", "Images"

DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; by default what suits the device.", rich_help_panel="Model"),
]
PromptsOption = Annotated[
    str,
    typer.Option(
        help="**scenes**, held-out captions that the shipped model draws and a judge reads back; a .txt or .csv file; "
        "or a folder of MS-COCO.",
        rich_help_panel=IMAGES_PANEL,
    ),
]
CaptionsOption = Annotated[
    int | None,
    typer.Option(help="How many, from the first; by default all, or 500 scenes.", rich_help_panel=IMAGES_PANEL),
]
StepsOption = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=IMAGES_PANEL, callback=at_least_one)]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale; by default what suits the model.", rich_help_panel=IMAGES_PANEL, callback=checked_guidance
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(help="WxH in pixels; by default the model's own.", rich_help_panel=IMAGES_PANEL)
]
SeedOption = Annotated[
    int,
    typer.Option(
        help="Of the noise of the first image, each next has one more; and of which scenes are drawn.",
        rich_help_panel=IMAGES_PANEL,
        callback=checked_seed,
    ),
]
BatchOption = Annotated[
    int, typer.Option(help="Images drawn at once.", rich_help_panel=IMAGES_PANEL, callback=at_least_one)
]
MetricsOption = Annotated[
    str,
    typer.Option(
        help="Of **distance** (to dense), **lpips** (to dense), **accuracy** (of captions, scenes only, scaled to the "
        "judge's 128 px), **clip** and **fid**.",
        rich_help_panel=METRICS_PANEL,
    ),
]
ClipModelOption = Annotated[
    str | None,
    typer.Option(
        help="An open_clip model; by default ViT-g-14, and **tiny**, a small one of our own, for scenes.",
        rich_help_panel=METRICS_PANEL,
    ),
]
ClipWeightsOption = Annotated[
    str, typer.Option(help="Its weights, and those of FID's open_clip model.", rich_help_panel=METRICS_PANEL)
]
FidFeaturesOption = Annotated[
    str | None,
    typer.Option(
        help="**inception**, or an open_clip model; by default inception, and **tiny** for scenes.",
        rich_help_panel=METRICS_PANEL,
    ),
]
FolderOption = Annotated[
    Path, typer.Option(help="Folder; a run that was stopped goes on there.", rich_help_panel="Output")
]


def opened_alone(model: str, device: str | None, dtype: str | None, console: Console) -> Any:
    """Open a pipeline for one process, and say so while it lasts."""
    import torch
    from rich.markup import escape

    from atedm.choices import check_name
    from atedm.pipelines import load_pipeline, quiet_libraries

    if dtype is not None:
        check_name("dtype", dtype, ("float32", "bfloat16", "float16"))
    quiet_libraries()
    with console.status(f"opening {escape(model)}"):
        return load_pipeline(model, device=device, dtype=getattr(torch, dtype) if dtype else None)


class Asked(NamedTuple):
    """What was asked for, checked before any model is opened."""

    prompts: list[Prompt]
    metrics: Metrics
    drawing: Drawing


def read_options(
    model: str,
    dtype: str | None,
    prompts: str,
    captions: int | None,
    steps: int,
    guidance: float | None,
    size: str | None,
    seed: int,
    batch: int,
    metrics: str,
    clip_model: str | None,
    clip_pretrained: str,
    fid_features: str | None,
    at_most: int | None = None,
) -> Asked:
    """Check the options and read the prompts: ``at_most`` where no number of captions is given."""
    from atedm.choices import check_name
    from atedm.evaluation.clip_score import TINY_CLIP
    from atedm.evaluation.images import Drawing
    from atedm.evaluation.prompts import SCENES, read_prompts
    from atedm.evaluation.scores import CLIP, FID, LPIPS, METRICS, Metrics
    from atedm.pipelines import habits

    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    for name in names:
        check_name("metric", name, METRICS)
        package = {CLIP: "open_clip", FID: "cleanfid", LPIPS: "lpips"}.get(name)
        if package is not None and find_spec(package) is None:  # told now, not when all images are drawn
            raise ImportError(f"{name} needs {package}: pip install 'atedm[evaluate]', or leave it out of --metrics")
    if dtype is not None:
        check_name("dtype", dtype, ("float32", "bfloat16", "float16"))
    width, height = parse_size(size)
    scale = habits(model).guidance if guidance is None else guidance
    drawing = Drawing(model, steps, scale, seed, batch, width, height, dtype or "")
    of_scenes = prompts == SCENES
    read = read_prompts(prompts, captions, seed, at_most=at_most)
    _tell_what_is_left_out(names, read)
    return Asked(
        read,
        Metrics(
            names,
            clip_model or (TINY_CLIP if of_scenes else "ViT-g-14"),
            clip_pretrained,
            fid_features or (TINY_CLIP if of_scenes else "inception"),
        ),
        drawing,
    )


def _tell_what_is_left_out(metrics: tuple[str, ...], prompts: list[Prompt]) -> None:
    from atedm.evaluation.scores import ACCURACY, FID

    if ACCURACY in metrics and not any(prompt.scene is not None for prompt in prompts):
        typer.echo("accuracy is left out: only the captions of scenes can be read back", err=True)
    if FID in metrics and not all(prompt.scene is not None or prompt.picture is not None for prompt in prompts):
        typer.echo("fid is left out: it needs a real picture of every prompt, as scenes and MS-COCO have", err=True)


class Opened(NamedTuple):
    """A model ready to draw, this process' part in the work, and what to tell of progress."""

    pipe: Any
    drawing: Drawing
    state: PartialState
    tell: Progress


@contextmanager
def opened(drawing: Drawing, device: str | None) -> Iterator[Opened]:
    """Open the model that ``drawing`` names, and show a progress bar in the first process."""
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from atedm.evaluation.sharing import shared_work
    from atedm.patching.survey import find_unet
    from atedm.pipelines import load_pipeline

    state = shared_work(device)
    console = Console(stderr=True, quiet=not state.is_main_process)
    with console.status(f"opening {escape(drawing.model)}"):
        precision = getattr(torch, drawing.dtype) if drawing.dtype else None
        pipe = load_pipeline(drawing.model, device=device or str(state.device), dtype=precision)
    with Progress(console=console) as bar:
        task = bar.add_task("images", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=done, total=total)

        yield Opened(pipe, replace(drawing, dtype=str(find_unet(pipe).dtype).removeprefix("torch.")), state, tell)
