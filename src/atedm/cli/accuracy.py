"""`atedm accuracy`: how well the shipped model draws what captions say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.options import CaptionGuidance, CaptionSeed, CaptionSteps, RateOption, pruning_config


def accuracy(
    captions: Annotated[int, typer.Option(help="Held-out captions.")] = 500,
    steps: CaptionSteps = 20,
    guidance: CaptionGuidance = 3.0,
    seed: CaptionSeed = 0,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Prune by a preset, paper where only a rate is given; dense without either.",
            rich_help_panel="Pruning",
        ),
    ] = None,
    pruning_rate: RateOption = None,
    sheet: Annotated[Path | None, typer.Option(help="Also draw the first 32 images, wrong ones marked.")] = None,
) -> None:
    """Print the caption accuracy of the model that ships: colour, shape, relation, background, texture.

    A small classifier, trained on rendered scenes only, reads each image back.
    """
    from contextlib import nullcontext

    from rich.console import Console
    from rich.progress import Progress

    from atedm.evaluation.captions import columns, judge_images, make_scenes
    from atedm.evaluation.sheets import judged_sheet
    from atedm.evaluation.statistics import ratio_interval
    from atedm.files import check_writable, save_image
    from atedm.patching.apply import pruned
    from atedm.pipelines import TINY, load_pipeline, quiet_libraries, tiny_folder
    from atedm.tiny.classifier import load_classifier
    from atedm.tiny.scenes import held_out_scenes

    check_writable(sheet)
    asked_to_prune = preset is not None or pruning_rate is not None
    config = pruning_config(preset or "paper", pruning_rate) if asked_to_prune else None
    if captions < 1 or steps < 1:
        raise ValueError("captions and steps must be at least 1")
    quiet_libraries()
    pipe = load_pipeline(TINY)
    scenes = held_out_scenes(captions, seed)
    with Progress(console=Console(stderr=True)) as bar, pruned(pipe, config) if config else nullcontext():
        task = bar.add_task("images", total=captions)
        images = make_scenes(
            pipe, scenes, steps=steps, guidance=guidance, seed=seed, progress=lambda n: bar.advance(task, n)
        )
    judgements = judge_images(load_classifier(tiny_folder() / "classifier.safetensors"), scenes, images)
    for name, pair in columns(judgements).items():
        if sum(pair[1]):
            typer.echo(f"{name:<11} {ratio_interval(*pair).text(100)} %")
    if sheet is not None:
        save_image(judged_sheet(scenes, images, judgements), sheet)
        typer.echo(str(sheet))
