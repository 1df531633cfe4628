"""`atedm generate`: make images, dense and pruned side by side if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.options import (
    BudgetOption,
    DeviceOption,
    ModelOption,
    OutOption,
    PresetOption,
    RateOption,
    budget_share,
    parse_size,
    pruning_config,
)

_WITH_AGAIN = ("again", "out", "device", "compare", "maps")
"""What may be given beside ``--again``, because it is not of the run itself."""


def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One image each. Without any, a good set for the model.", show_default=False),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    preset: PresetOption = None,
    pruning_rate: RateOption = None,
    budget: BudgetOption = None,
    protect: Annotated[
        Path | None,
        typer.Option(help="A picture, white where no token is to be dropped.", rich_help_panel="Pruning"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; 50, or 4 for few-step models.", rich_help_panel="Image")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; by default what suits the model.", rich_help_panel="Image")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WxH in pixels; by default the model's own.", rich_help_panel="Image")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; each next has one more.", rich_help_panel="Image")
    ] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also make each image dense, and with another preset beside, and one sheet to compare.",
            rich_help_panel="Output",
        ),
    ] = False,
    beside: Annotated[
        str | None,
        typer.Option(
            help="Preset to show beside it with --compare, at the same cost where it comes down to that, or none. "
            "By default matched beside the paper's, and paper beside ours.",
            rich_help_panel="Output",
        ),
    ] = None,
    maps: Annotated[
        bool,
        typer.Option("--maps", help="Draw importance and kept tokens per block and step.", rich_help_panel="Output"),
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option(help="A run.json: draw that run again, from its model to its seed.", rich_help_panel="Image"),
    ] = None,
    out: OutOption = Path("out"),
) -> None:
    """Make images with tokens pruned.

    Examples:
    `atedm generate --compare` draws a set of scenes with the model that ships, dense and pruned.

    `atedm generate "a red circle above a blue square" --pruning-rate 0.5 --maps`

    `atedm generate --budget 0.9 --compare` prunes as much as it takes for a run to cost 90 % of the dense one.

    `atedm generate "a fox in snow" --model stabilityai/stable-diffusion-xl-base-1.0 --compare`

    `atedm generate --again out/run.json --out out/again` draws a run again.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from atedm.generate import generate as make
    from atedm.generate import shown_beside, within_budget
    from atedm.pipelines import habits, load_pipeline, quiet_libraries
    from atedm.request import Request
    from atedm.run_file import read_run_file

    if beside and not compare:
        raise ValueError("--beside is what --compare shows beside an image; give --compare too")
    if again is not None:
        if extra := [name for name in _given(context, _WITH_AGAIN) if (name, beside) != ("--beside", "none")]:
            raise ValueError(f"--again draws a run as it was; leave out {', '.join(extra)}")
        model, request = read_run_file(again)
        if beside == "none":
            request = replace(request, beside=None)
    else:
        suits = habits(model)
        width, height = parse_size(size)
        request = Request(
            prompts=tuple(prompts or suits.prompts),
            config=pruning_config(preset or suits.preset, pruning_rate),
            steps=suits.steps if steps is None else steps,
            guidance=suits.guidance if guidance is None else guidance,
            width=width,
            height=height,
            seed=seed,
            protect=None if protect is None else str(protect),
        )
    share = budget_share(budget, pruning_rate)
    console = Console(stderr=True)
    quiet_libraries()
    with console.status(f"opening {escape(model)}"):
        pipe = load_pipeline(model, device=device)
        if share is not None:
            request = within_budget(pipe, request, share)
        if compare and beside != "none" and request.beside is None:
            request = shown_beside(pipe, request, beside or "")
    ways = 1 + compare + (request.beside is not None)
    total = len(request.prompts) * ways * request.steps
    with Progress(console=console) as bar:
        task = bar.add_task("images", total=total)
        done = {"whole": 0}

        def on_step(what: str, step: int, steps: int) -> None:
            bar.update(task, description=escape(what), completed=done["whole"] + step)
            done["whole"] += steps if step == steps else 0

        made = make(pipe, request, out, compare=compare, maps=maps, model=model, progress=on_step)
        bar.update(task, completed=total, description="images")
    for image in made:
        line = f"{out / image.file}  seed {image.seed}  kept {image.kept_share:.1%}  {image.seconds:.2f} s"
        if image.psnr_to_dense is not None:
            line += f"  (dense {image.dense_seconds:.2f} s, {image.psnr_to_dense:.1f} dB apart)"
        typer.echo(line)
        if image.beside is not None:
            other = image.beside
            typer.echo(
                f"{out / other.file}  beside  kept {other.kept_share:.1%}  {other.seconds:.2f} s"
                f"  ({other.psnr_to_dense:.1f} dB apart)"
            )
    typer.echo(f"{out / 'comparison.png'}" if compare else f"{out / 'run.json'}")


def _given(context: typer.Context, but: tuple[str, ...]) -> list[str]:
    """Options that were given, whatever their value, but for some."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in but
        and parameter.name is not None
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
