"""`atedm objects`: whether rankings find the objects, and whether kept tokens stand for the dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.evaluation_options import BatchOption, DtypeOption, GuidanceOption, SeedOption, StepsOption, opened_alone
from atedm.cli.options import DeviceOption
from atedm.cli.progress import rounds_shown

if TYPE_CHECKING:
    from atedm.evaluation.objects import ObjectsReport


def objects(
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    captions: Annotated[int, typer.Option(help="How many held-out scenes to draw.", rich_help_panel="Images")] = 50,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    pruning_rate: Annotated[
        float, typer.Option(help="Share of the tokens taken for dropped.", rich_help_panel="Images")
    ] = 0.63,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, every block in every step.", rich_help_panel="Output")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a chart into this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Hold every ranking against the objects in the images that the shipped model draws, dense.

    AUC is the chance that a token of an object ranks above one of the background: 0.5 is chance. A match is the cosine
    between a dropped token and a kept one: the one most like it, and the one that the paper's rule copies from.
    """
    from json import dumps

    from rich.console import Console

    from atedm.evaluation.objects import find_objects
    from atedm.files import check_writable, save_image
    from atedm.pictures.objects_chart import objects_chart
    from atedm.pipelines import habits
    from atedm.tiny.scenes import held_out_scenes

    check_writable(plot)
    if captions < 1:
        raise ValueError(f"captions must be at least 1, not {captions}")
    if not 0 < pruning_rate < 1:
        raise ValueError(
            f"pruning_rate must be above 0, for there to be dropped tokens, and below 1, not {pruning_rate}"
        )
    console = Console(stderr=True)
    pipe = opened_alone("tiny", device, dtype, console)
    with rounds_shown(console, -(-captions // batch)) as on_call:
        report = find_objects(
            pipe,
            held_out_scenes(captions, seed),
            steps=steps,
            guidance=habits("tiny").guidance if guidance is None else guidance,
            pruning_rate=pruning_rate,
            seed=seed,
            batch=batch,
            progress=on_call,
        )
    if plot is not None:
        save_image(objects_chart(report, f"{captions} scenes, {steps} steps"), plot)
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    for line in _table(report):
        typer.echo(line)
    if plot is not None:
        typer.echo(str(plot))


def _table(report: ObjectsReport) -> list[str]:
    names = {"auc": "AUC", "best_match": "best match", "attention_match": "attention's match"}
    head = ["ranking", *(f"{text}, level {level}" for text in names.values() for level in report.levels)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for ranking in report.rankings:
        cells = [f"{report.mean(what, ranking=ranking, level=level):.3f}" for what in names for level in report.levels]
        lines.append("| " + " | ".join([ranking, *cells]) + " |")
    return lines
