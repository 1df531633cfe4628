"""`atedm evaluate`: methods side by side on equal prompts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.evaluation_options import (
    BatchOption,
    CaptionsOption,
    ClipModelOption,
    ClipWeightsOption,
    DtypeOption,
    FidFeaturesOption,
    FolderOption,
    GuidanceOption,
    MetricsOption,
    PromptsOption,
    SeedOption,
    SizeOption,
    StepsOption,
    opened,
    read_options,
)
from atedm.cli.options import DeviceOption, ModelOption


def evaluate(
    methods: Annotated[
        str,
        typer.Argument(
            help="Split by commas: **dense**, **paper**, **dagger**, **turbo**, **matched**, **tome**, **deepcache**, "
            "with changes in brackets, joined by + where one is applied on top of another."
        ),
    ] = "dense,paper,dagger,matched,tome[cost=paper]",
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    prompts: PromptsOption = "scenes",
    captions: CaptionsOption = None,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    metrics: MetricsOption = "distance,accuracy,clip,fid",
    clip_model: ClipModelOption = None,
    clip_pretrained: ClipWeightsOption = "laion2b_s34b_b88k",
    fid_features: FidFeaturesOption = None,
    out: FolderOption = Path("out/evaluate"),
) -> None:
    """Draw the same prompts from the same noise with several methods, and score them.

    A run that was stopped goes on where it was. Work is shared among processes, GPUs and machines by
    `accelerate launch -m atedm evaluate ...`; on a CPU accelerate starts several processes only if it is told
    `accelerate launch --multi_gpu --num_processes 2 -m atedm evaluate ...`.

    Examples:
    `atedm evaluate --captions 50`

    `atedm evaluate "dense,paper,paper[recovery=direct-copy],tome[cost=paper],deepcache[interval=2]"`

    `atedm evaluate --model stabilityai/stable-diffusion-xl-base-1.0 --prompts COCO_FOLDER --captions 5000 --steps 50`
    """
    from atedm.evaluation.evaluate import evaluate as run
    from atedm.evaluation.methods_by_name import method_by_name, parse_methods
    from atedm.evaluation.report import image_sheet, markdown, write_html
    from atedm.files import save_image
    from atedm.pipelines import quiet_libraries

    quiet_libraries()
    asked = read_options(
        model, dtype, prompts, captions, steps, guidance, size, seed, batch, metrics, clip_model, clip_pretrained,
        fid_features,
    )  # fmt: skip
    pixels = asked.drawing.size
    chosen = {spec: method_by_name(spec, model, size=pixels, steps=steps) for spec in parse_methods(methods)}
    with opened(asked.drawing, device) as (pipe, drawing, state, tell):
        results = run(pipe, chosen, asked.prompts, drawing, asked.metrics, out, state=state, progress=tell)
    if not state.is_main_process:
        return
    note = (
        f"{model}, {len(asked.prompts)} prompts of {prompts}, {steps} steps, guidance {drawing.guidance:g}, "
        f"{drawing.dtype}"
    )
    save_image(image_sheet(results, asked.prompts), out / "sheet.png")
    write_html(results, asked.prompts, "Methods side by side", note, out / "report.html")
    typer.echo(markdown(results))
    typer.echo(str(out / "report.html"))
