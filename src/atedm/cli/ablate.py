"""`atedm ablate`: what each choice of the paper is worth, on the model that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.options import CaptionGuidance, CaptionSeed, CaptionSteps, at_least_one


def ablate(
    captions: Annotated[int, typer.Option(help="Held-out captions per row.", callback=at_least_one)] = 200,
    steps: CaptionSteps = 20,
    guidance: CaptionGuidance = 3.0,
    seed: CaptionSeed = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="A row by its name; may be given again.", show_default=False)
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes; give as many as there are cores.", callback=at_least_one)
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the rows: a run that was stopped goes on from there.")] = Path(
        "out/ablation"
    ),
) -> None:
    """Print the ablation table: every variant draws the same captions from the same noise and is judged.

    Dense, the paper's presets, other rankings, recoveries, places and schedules: caption accuracy and distance to the
    dense image with 95 % intervals (bootstrap over captions), as Markdown. The docs show the table it printed. Rows are
    kept by their settings, and the whole table as table.md.
    """
    from rich.console import Console

    from atedm.evaluation.ablation import Settings, markdown, measure
    from atedm.files import save_text
    from atedm.pipelines import quiet_libraries

    settings = Settings(captions=captions, steps=steps, guidance=guidance, seed=seed)
    console = Console(stderr=True)
    quiet_libraries()
    with console.status("measuring; each row is kept as it is done"):
        rows = measure(
            out,
            settings,
            only=only or (),
            workers=workers,
            report=lambda row: console.print(f"{row.name}: all right {row.accuracy['all'].text(100)} %"),
        )
    table = markdown(rows)
    if not only:
        save_text(table + "\n", out / "table.md")
    typer.echo(table)
