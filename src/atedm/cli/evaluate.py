"""`atedm evaluate`: methods side by side on equal prompts and noise. `atedm lab reproduce` is the same by a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, ModelOption, SizeOption, at_least_one
from atedm.lab.evaluation.experiments import EXPERIMENTS, Experiment

if TYPE_CHECKING:
    from atedm.lab.evaluation.prompts import Prompt
    from atedm.lab.evaluation.scoring import Metrics

IMAGES, METRICS = "Images", "Metrics"
NAMES = ", ".join(f"**{name}**" for name in EXPERIMENTS)


def evaluate(
    methods: Annotated[
        str,
        typer.Argument(
            help="Split by commas: **dense**, **matched**, **paper**, **dagger**, **turbo**, **tome**, **deepcache**, "
            "with changes in brackets, joined by + where one is applied on top of another. Or the name of an "
            f"experiment: {NAMES}."
        ),
    ] = "dense,matched,paper,dagger,tome[cost=paper]",
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="**scenes**, held-out captions that the shipped model draws and a judge reads back; a .txt or .csv "
            "file; or a folder of MS-COCO.",
            rich_help_panel=IMAGES,
        ),
    ] = "scenes",
    captions: Annotated[
        int | None, typer.Option(help="How many; by default all, or 500 scenes.", rich_help_panel=IMAGES)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps; by default what suits the model, 20 for **tiny**, or what few-steps varies.",
            rich_help_panel=IMAGES,
            callback=at_least_one,
        ),
    ] = None,
    guidance: shared.GuidanceOption = None,
    size: SizeOption = None,
    seed: shared.SeedOption = 0,
    batch: shared.BatchOption = 10,
    metrics: Annotated[
        str,
        typer.Option(
            help="Of **distance** and **lpips** to dense, **accuracy** of scenes' captions, **clip** and **fid**.",
            rich_help_panel=METRICS,
        ),
    ] = "distance,accuracy,clip,fid",
    clip_model: Annotated[
        str | None,
        typer.Option(
            help="An open_clip model; by default ViT-g-14, and **tiny**, a small one of our own, for scenes.",
            rich_help_panel=METRICS,
        ),
    ] = None,
    clip_pretrained: Annotated[
        str, typer.Option(help="Its weights, and those of FID's open_clip model.", rich_help_panel=METRICS)
    ] = "laion2b_s34b_b88k",
    fid_features: Annotated[
        str | None,
        typer.Option(
            help="**inception**, or an open_clip model; by default inception, and **tiny** for scenes.",
            rich_help_panel=METRICS,
        ),
    ] = None,
    sheet: Annotated[
        int,
        typer.Option(
            help="Rows of the sheet of images; a red frame marks what the judge finds wrong.",
            rich_help_panel="Output",
            callback=at_least_one,
        ),
    ] = 6,
    out: Annotated[
        Path, typer.Option(help="Folder; a run that was stopped goes on there.", rich_help_panel="Output")
    ] = Path("out/evaluate"),
) -> None:
    """Draw the same prompts from the same noise with several methods, and score them.

    Images are kept by setting and method: a run that was stopped goes on, and experiments share them. Processes, GPUs
    and machines share the work by `accelerate launch -m atedm evaluate ...`; on a CPU accelerate starts several
    processes only if it is told `accelerate launch --multi_gpu --num_processes 2 -m atedm evaluate ...`.

    Examples:
    `atedm evaluate --captions 50`

    `atedm evaluate "dense,matched,paper[refill=direct-copy],tome[cost=paper],deepcache[interval=2]"`
    """
    from atedm.hosts.models import find_model
    from atedm.lab.evaluation.outcomes import run_experiment
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.evaluation.report import write_report
    from atedm.lab.evaluation.sharing import shared_work
    from atedm.lab.methods.by_name import parse_methods
    from atedm.suits import suits

    if methods in EXPERIMENTS:
        experiment = EXPERIMENTS[methods].under(steps, guidance)
        asked = [
            "" if steps is None else f"{steps}-step{'s' * (steps > 1)}",
            "" if guidance is None else f"guidance-{guidance:g}",
            *(size or "", "" if dtype is None else dtype.value),
        ]
        name = "-".join([methods, *filter(None, asked)])  # other settings have results of their own
    else:
        name = "report"
        experiment = Experiment("Methods side by side", "", {spec: spec for spec in parse_methods(methods)})
    chosen = _metrics(metrics, prompts, clip_model, clip_pretrained, fid_features)
    drawing = shared.drawing_of(model, steps or suits(model).steps, guidance, seed, batch, size)
    read = read_prompts(prompts, captions, seed)
    _tell_what_is_left_out(chosen, read)
    state = shared_work(device)
    pipe = shared.open_pipeline(model, device or str(state.device), dtype)
    drawing = replace(drawing, dtype=str(find_model(pipe).dtype).removeprefix("torch."))
    with shared.progress_bar(quiet=not state.is_main_process) as tell:
        outcomes = run_experiment(experiment, pipe, read, drawing, chosen, out, state=state, progress=tell)
    if state.is_main_process:
        typer.echo(write_report(experiment, outcomes, read, chosen, out, name, sheet))
        typer.echo(str(out / f"{name}.html"))


def _metrics(names: str, prompts: str, clip_model: str | None, clip_pretrained: str, fid: str | None) -> Metrics:
    """Read the metrics, and see that their packages are there before anything is drawn."""
    from atedm.lab.evaluation.prompts import SCENES
    from atedm.lab.evaluation.scoring import METRICS, PACKAGES, Metrics
    from atedm.lab.extra import optional
    from atedm.lab.scores.clip_score import CLIP_MODEL, TINY_CLIP
    from atedm.lab.scores.fid import INCEPTION
    from atedm.words import check_name

    optional("scipy.stats")  # of every interval
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
