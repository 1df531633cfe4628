"""`atedm evaluate`: methods side by side on equal prompts and noise. `atedm lab reproduce` is the same by a name."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import options, running
from atedm.lab.evaluation.experiments import EXPERIMENTS, Experiment

SCORES = options.panel("Metrics")
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
    model: options.Model = "tiny",
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompts: options.Prompts = "scenes",
    captions: Annotated[int | None, options.IMAGES("How many; by default all, or 500 scenes.")] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    batch: options.Batch = 10,
    metrics: Annotated[
        str, SCORES("Of **distance** and **lpips** to dense, **accuracy** of scenes' captions, **clip** and **fid**.")
    ] = "distance,accuracy,clip,fid",
    clip_model: Annotated[
        str | None, SCORES("An open_clip model; by default ViT-g-14, and **tiny**, one of our own, for scenes.")
    ] = None,
    clip_pretrained: Annotated[str, SCORES("Its weights, and those of FID's open_clip model.")] = "laion2b_s34b_b88k",
    fid_features: Annotated[
        str | None, SCORES("**inception**, or an open_clip model; by default inception, and **tiny** for scenes.")
    ] = None,
    sheet: Annotated[
        int,
        options.OUTPUT("Rows of the sheet; a red frame marks a wrong image.", callback=options.at_least_one),
    ] = 6,
    out: options.Folder = Path("out/evaluate"),
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
    from atedm.lab.evaluation.prompts import SCENES, read_prompts
    from atedm.lab.evaluation.report import write_report
    from atedm.lab.evaluation.run import run_experiment
    from atedm.lab.evaluation.scoring import ACCURACY, FID, METRICS, PACKAGES, Metrics
    from atedm.lab.evaluation.sharing import shared_work
    from atedm.lab.extra import optional
    from atedm.lab.methods.by_name import parse_methods
    from atedm.lab.scores.clip_score import CLIP_MODEL, TINY_CLIP
    from atedm.lab.scores.fid import INCEPTION
    from atedm.tiny import objects_of
    from atedm.words import check_name

    if methods in EXPERIMENTS:
        experiment = EXPERIMENTS[methods].under(guidance)
        asked = [
            "" if steps is None else f"{steps}-step{'s' * (steps > 1)}",
            "" if guidance is None else f"guidance-{guidance:g}",
            *(size or "", "" if dtype is None else dtype.value),
        ]
        name = "-".join([methods, *filter(None, asked)])  # other settings have results of their own
    else:
        name = "report"
        experiment = Experiment("Methods side by side", "", {spec: spec for spec in parse_methods(methods)})
    optional("scipy.stats")  # of every interval
    names = tuple(word.strip() for word in metrics.split(",") if word.strip())
    for metric in names:  # before anything is drawn
        check_name("metric", metric, METRICS)
        if metric in PACKAGES:
            optional(PACKAGES[metric])
    own = TINY_CLIP if prompts == SCENES else None
    chosen = Metrics(names, clip_model or own or CLIP_MODEL, clip_pretrained, fid_features or own or INCEPTION)
    drawing = running.drawing_of(model, steps, guidance, seed, batch, size)
    read = read_prompts(prompts, captions, seed, objects=objects_of(model))
    if ACCURACY in chosen.names and not any(prompt.scene is not None for prompt in read):
        typer.echo("accuracy is left out: only the captions of scenes can be read back", err=True)
    if FID in chosen.names and not all(prompt.has_reference for prompt in read):
        typer.echo("fid is left out: it needs a real picture of every prompt, as scenes and MS-COCO have", err=True)
    state = shared_work(device)
    pipe = running.open_pipeline(model, device or str(state.device), dtype)
    drawing = replace(drawing, dtype=str(find_model(pipe).dtype).removeprefix("torch."))
    with running.progress_bar(quiet=not state.is_main_process) as tell:
        outcomes = run_experiment(experiment, pipe, read, drawing, chosen, out, state=state, progress=tell)
    if state.is_main_process:
        typer.echo(write_report(experiment, outcomes, read, chosen, out, name, sheet))
        typer.echo(str(out / f"{name}.html"))
