"""`atedm lab reproduce`: the paper's tables, curves and ablations, one word each."""

from __future__ import annotations

from enum import Enum
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
from atedm.cli.lab.options import BatchOption, DtypeOption, GuidanceOption, SeedOption
from atedm.cli.options import DeviceOption, ModelOption, SizeOption, at_least_one, pixels
from atedm.lab.evaluation.experiments import EXPERIMENTS

ExperimentName = Enum("ExperimentName", {name: name for name in EXPERIMENTS})  # type: ignore[misc]
"""What can be reproduced."""


def reproduce(
    experiment: Annotated[ExperimentName, typer.Argument(help="What to run.")],
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    prompts: PromptsOption = "scenes",
    captions: CountOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps; by default 20, or what few-steps varies.",
            rich_help_panel="Images",
            callback=at_least_one,
        ),
    ] = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    metrics: MetricsOption = "distance,accuracy,clip,fid",
    clip_model: ClipModelOption = None,
    clip_pretrained: ClipWeightsOption = "laion2b_s34b_b88k",
    fid_features: FidFeaturesOption = None,
    sheet: SheetOption = 6,
    out: FolderOption = Path("out/reproduce"),
) -> None:
    """Run one of the paper's experiments: numbers, a chart and a sheet of images.

    It is `atedm evaluate` with a list of methods and settings. Images are kept by setting and method, so experiments
    share them and a run that was stopped goes on.

    Examples:
    `atedm lab reproduce table1 --captions 100`

    `atedm lab reproduce curve --guidance 7` runs one of the twelve scales, as curve-guidance-7; the whole curve finds
    its images.
    """
    chosen = EXPERIMENTS[experiment.value].under(steps, guidance)
    asked = {
        "steps": None if steps is None else f"{steps}-step{'s' * (steps > 1)}",
        "guidance": None if guidance is None else f"guidance-{guidance:g}",
        "size": None if size is None else "{}x{}".format(*(pixels(size) or ())),
        "dtype": None if dtype is None else dtype.value,
    }
    run(
        chosen,
        "-".join([experiment.value, *filter(None, asked.values())]),  # so that other settings have results of their own
        model=model,
        device=device,
        dtype=dtype,
        prompts=prompts,
        captions=captions,
        steps=20 if steps is None else steps,
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
