"""`atedm tune`: find the plan that a model bears at a budget."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, SizeOption, at_least_one, pixels

IMAGES, SEARCH = "Images", "Search"


class BudgetOf(str, Enum):
    """What a budget is of."""

    time = "time"
    arithmetic = "arithmetic"


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="**tiny**, the model that ships; a hub id; a diffusers folder; or a single .safetensors file."
        ),
    ] = "tiny",
    budget: Annotated[
        float, typer.Option(help="What a run may take, as a share of the dense run.", rich_help_panel=SEARCH)
    ] = 0.5,
    of: Annotated[
        BudgetOf,
        typer.Option(
            help="**time** on this device, measured at the start; or **arithmetic**, the same everywhere.",
            rich_help_panel=SEARCH,
        ),
    ] = BudgetOf.time,
    images: Annotated[
        float, typer.Option(help="What the search may take, in dense images.", rich_help_panel=SEARCH)
    ] = 100.0,
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Your own: a .txt file of a prompt a line, or a .csv file. By default a set of ours.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    captions: Annotated[
        int, typer.Option(help="How many prompts to draw.", rich_help_panel=IMAGES, callback=at_least_one)
    ] = 8,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Of the dense run; by default what suits the model.", rich_help_panel=IMAGES, callback=at_least_one
        ),
    ] = None,
    guidance: shared.GuidanceOption = None,
    size: SizeOption = None,
    seed: shared.SeedOption = 0,
    out: Annotated[
        Path, typer.Option(help="Folder; a search that was stopped goes on there.", rich_help_panel="Output")
    ] = Path("out/tune"),
) -> None:
    """Find the steps, scheduler, pruning and cache whose images are nearest to dense ones at a budget.

    It draws a few prompts dense, then by each single technique at the budget, then by combinations that an optimiser
    proposes, and writes `plan.json` and a page, `plan.html`. Ctrl+C ends it with the best so far. The same command goes
    on where it was stopped.

    Examples:
    `atedm tune tiny --budget 0.5 --steps 20`

    `atedm tune ./my-checkpoint.safetensors --budget 0.4 --prompts my-prompts.txt`

    `atedm generate "a fox in snow" --model ./my-checkpoint.safetensors --plan out/tune/plan.json --compare`
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.extra import optional
    from atedm.tuning.prompts import tuning_prompts
    from atedm.tuning.tune import tune as search

    optional("optuna", "tune")
    if prompts is None:
        texts = tuning_prompts(model, captions)
    else:
        texts = [prompt.text for prompt in read_prompts(str(prompts), at_most=captions)]
    pipe = shared.open_pipeline(model, device, dtype)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=images)

        def tell(what: str, done: float, total: float) -> None:
            bar.update(task, description=escape(what), completed=done, total=total)

        tuned = search(
            pipe,
            budget,
            of=of.value,
            prompts=texts,
            steps=steps,
            guidance=guidance,
            size=pixels(size),
            images=images,
            seed=seed,
            model=model,
            out=out,
            progress=tell,
        )
    found = tuned.plan.found
    for one in [one for one in tuned.tried if one.is_whole][:5]:
        typer.echo(f"{one.distance:6.2f} dB at {one.share:.3f} of the dense {found['of']}  {one.plan.what()}")
    if tuned.was_stopped:
        typer.echo("stopped; this is the best so far, and the same command goes on")
    typer.echo(f"{tuned.file}: {tuned.plan.what()}")
    typer.echo(str(tuned.page))
