"""What `atedm evaluate` and `atedm lab reproduce` share: their options, and the run itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.lab.options import Dtype, open_pipeline, progress_bar
from atedm.cli.options import at_least_one, pixels

if TYPE_CHECKING:
    from atedm.lab.evaluation.experiments import Experiment
    from atedm.lab.evaluation.prompts import Prompt
    from atedm.lab.evaluation.scoring import Metrics

PromptsOption = Annotated[
    str,
    typer.Option(
        help="**scenes**, held-out captions that the shipped model draws and a judge reads back; a .txt or .csv file; "
        "or a folder of MS-COCO.",
        rich_help_panel="Images",
    ),
]
CountOption = Annotated[
    int | None,
    typer.Option(help="How many, from the first; by default all, or 500 scenes.", rich_help_panel="Images"),
]
MetricsOption = Annotated[
    str,
    typer.Option(
        help="Of **distance** (to dense), **lpips** (to dense), **accuracy** (of captions, scenes only), **clip** and "
        "**fid**.",
        rich_help_panel="Metrics",
    ),
]
ClipModelOption = Annotated[
    str | None,
    typer.Option(
        help="An open_clip model; by default ViT-g-14, and **tiny**, a small one of our own, for scenes.",
        rich_help_panel="Metrics",
    ),
]
ClipWeightsOption = Annotated[
    str, typer.Option(help="Its weights, and those of FID's open_clip model.", rich_help_panel="Metrics")
]
FidFeaturesOption = Annotated[
    str | None,
    typer.Option(
        help="**inception**, or an open_clip model; by default inception, and **tiny** for scenes.",
        rich_help_panel="Metrics",
    ),
]
SheetOption = Annotated[
    int,
    typer.Option(
        help="Rows of the sheet of images, in which a red frame marks a wrong one.",
        rich_help_panel="Output",
        callback=at_least_one,
    ),
]
FolderOption = Annotated[
    Path, typer.Option(help="Folder; a run that was stopped goes on there.", rich_help_panel="Output")
]


def run(
    experiment: Experiment,
    name: str,
    *,
    model: str,
    device: str | None,
    dtype: Dtype | None,
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
    sheet: int,
    out: Path,
) -> None:
    """Run an experiment, write what the folder ``out`` is to hold under ``name``, and print the tables."""
    from atedm.hosts.unet_spans import find_unet
    from atedm.lab.evaluation.images import Drawing
    from atedm.lab.evaluation.outcomes import run_experiment
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.evaluation.report import write_report
    from atedm.lab.evaluation.sharing import shared_work
    from atedm.suits import suits

    chosen = _metrics(metrics, prompts, clip_model, clip_pretrained, fid_features)
    width, height = pixels(size) or (None, None)
    scale = suits(model).guidance if guidance is None else guidance
    drawing = Drawing(model, steps, scale, seed, batch, width, height)
    read = read_prompts(prompts, captions, seed)
    _tell_what_is_left_out(chosen, read)
    state = shared_work(device)
    pipe = open_pipeline(model, device or str(state.device), dtype)
    drawing = replace(drawing, dtype=str(find_unet(pipe).dtype).removeprefix("torch."))
    with progress_bar(quiet=not state.is_main_process) as tell:
        outcomes = run_experiment(experiment, pipe, read, drawing, chosen, out, state=state, progress=tell)
    if state.is_main_process:
        typer.echo(write_report(experiment, outcomes, read, chosen, out, name, sheet))
        typer.echo(str(out / f"{name}.html"))


def _metrics(names: str, prompts: str, clip_model: str | None, clip_pretrained: str, fid: str | None) -> Metrics:
    """Read the metrics, and see that their packages are there: told now, not when all images are drawn."""
    from atedm.lab.evaluation.prompts import SCENES
    from atedm.lab.evaluation.scoring import METRICS, PACKAGES, Metrics
    from atedm.lab.extra import optional
    from atedm.lab.scores.clip_score import CLIP_MODEL, TINY_CLIP
    from atedm.lab.scores.fid import INCEPTION
    from atedm.words import check_name

    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in chosen:
        check_name("metric", name, METRICS)
        if name in PACKAGES:
            optional(PACKAGES[name])
    own = TINY_CLIP if prompts == SCENES else None
    return Metrics(chosen, clip_model or own or CLIP_MODEL, clip_pretrained, fid or own or INCEPTION)


def _tell_what_is_left_out(metrics: Metrics, prompts: list[Prompt]) -> None:
    from atedm.lab.evaluation.scoring import ACCURACY, FID

    if ACCURACY in metrics.names and not any(prompt.scene is not None for prompt in prompts):
        typer.echo("accuracy is left out: only the captions of scenes can be read back", err=True)
    if FID in metrics.names and not all(prompt.has_reference for prompt in prompts):
        typer.echo("fid is left out: it needs a real picture of every prompt, as scenes and MS-COCO have", err=True)
