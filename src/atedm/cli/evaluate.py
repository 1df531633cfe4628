"""`atedm evaluate`: methods side by side on equal prompts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.lab.evaluation import (
    ClipModelOption,
    ClipWeightsOption,
    CountOption,
    FidFeaturesOption,
    FolderOption,
    MetricsOption,
    PromptsOption,
    SheetOption,
    run,
)
from atedm.cli.lab.options import BatchOption, DtypeOption, GuidanceOption, SeedOption, StepsOption
from atedm.cli.options import DeviceOption, ModelOption, SizeOption


def evaluate(
    methods: Annotated[
        str,
        typer.Argument(
            help="Split by commas: **dense**, **matched**, **paper**, **dagger**, **turbo**, **tome**, **deepcache**, "
            "with changes in brackets, joined by + where one is applied on top of another."
        ),
    ] = "dense,matched,paper,dagger,tome[cost=paper]",
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    prompts: PromptsOption = "scenes",
    captions: CountOption = None,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    metrics: MetricsOption = "distance,accuracy,clip,fid",
    clip_model: ClipModelOption = None,
    clip_pretrained: ClipWeightsOption = "laion2b_s34b_b88k",
    fid_features: FidFeaturesOption = None,
    sheet: SheetOption = 6,
    out: FolderOption = Path("out/evaluate"),
) -> None:
    """Draw the same prompts from the same noise with several methods, and score them.

    A run that was stopped goes on where it was. Work is shared among processes, GPUs and machines by
    `accelerate launch -m atedm evaluate ...`; on a CPU accelerate starts several processes only if it is told
    `accelerate launch --multi_gpu --num_processes 2 -m atedm evaluate ...`.

    Examples:
    `atedm evaluate --captions 50`

    `atedm evaluate "dense,matched,paper[refill=direct-copy],tome[cost=paper],deepcache[interval=2]"`

    `atedm evaluate --model stabilityai/stable-diffusion-xl-base-1.0 --prompts COCO_FOLDER --captions 5000 --steps 50`
    """
    from atedm.lab.evaluation.experiments import Experiment
    from atedm.lab.methods.by_name import parse_methods

    run(
        Experiment("Methods side by side", "", {spec: spec for spec in parse_methods(methods)}),
        "report",
        model=model,
        device=device,
        dtype=dtype,
        prompts=prompts,
        captions=captions,
        steps=steps,
        guidance=guidance,
        size=size,
        seed=seed,
        batch=batch,
        metrics=metrics,
        clip_model=clip_model,
        clip_pretrained=clip_pretrained,
        fid_features=fid_features,
        sheet=sheet,
        out=out,
    )
