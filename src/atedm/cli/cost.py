"""`atedm cost`: what a model costs and what pruning saves, without its weights."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.options import (
    BudgetOption,
    MethodNameOption,
    RateOption,
    SizeOption,
    StepsOption,
    at_least_one,
    pixels,
    refuse_rate_and_budget,
)


def cost(
    model: Annotated[
        str,
        typer.Option(
            help="**sdxl**, **sdxl-turbo**, **sd15**, **sd21**, **flux**, **sd35-large**, **sd35-medium**, "
            "**qwen-image**, **z-image**, **pixart-sigma** or **tiny**, which need no download; a diffusers folder or "
            "a hub id, of which only the config is read.",
            rich_help_panel="Model",
        ),
    ] = "sdxl",
    method: MethodNameOption = None,
    rate: RateOption = None,
    budget: BudgetOption = None,
    size: SizeOption = None,
    batch: Annotated[
        int, typer.Option(help="Images made at once.", rich_help_panel="Image", callback=at_least_one)
    ] = 1,
    guidance: Annotated[
        bool | None,
        typer.Option(
            "--guidance/--no-guidance",
            help="With guidance the U-Net runs twice for an image; by default what suits the model.",
            show_default=False,
            rich_help_panel="Image",
        ),
    ] = None,
    steps: StepsOption = None,
    tome_ratio: Annotated[
        float,
        typer.Option(
            help="Share of the tokens that ToMe merges, which is shown beside; up to 0.75.", rich_help_panel="Output"
        ),
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the cost of each stage to this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Print what a model costs at a size and what pruning saves, without its weights.

    Figures are multiply-accumulates (MACs), counted in two ways. **exact** is everything that torch counts, with what
    pruning adds. **paper** is Linear, convolution and self-attention, as in the paper's tables, without what pruning
    adds. Cost is the share of the dense MACs over a run.

    Examples:
    `atedm cost` is SDXL at 1024 px with our own method.

    `atedm cost --method paper --size 2048x2048`

    `atedm cost --model flux --steps 4`

    `atedm cost --budget 0.7` solves for the rate at which a run costs 70 % of the dense one.
    """
    from rich.console import Console
    from rich.markup import escape

    from atedm.app.equal_cost import method_at
    from atedm.app.models import quiet_libraries
    from atedm.cli.cost_tables import cost_text
    from atedm.costs.architectures import architecture
    from atedm.costs.budget import fit_to_budget
    from atedm.costs.report import cost as cost_of
    from atedm.costs.spans import CONVENTIONS
    from atedm.costs.tome import LEVELS, MERGES, ToMe
    from atedm.files import check_writable, save_image
    from atedm.suits import suits

    check_writable(plot)
    refuse_rate_and_budget(rate, budget)
    quiet_libraries()
    steps = suits(model).steps if steps is None else steps
    is_transformer = architecture(model).is_transformer
    chosen = method_at(suits(model).method if method is None else method.value, rate, transformer=is_transformer)
    tomes = [] if is_transformer else [ToMe(tome_ratio, merge, levels) for levels in LEVELS for merge in MERGES]
    with Console(stderr=True).status(f"counting {escape(model)}"):
        if budget is not None:
            chosen = fit_to_budget(model, chosen, share=budget, size=pixels(size), guidance=guidance, steps=steps)
        report = cost_of(model, chosen, size=pixels(size), batch=batch, guidance=guidance, steps=steps)
    if plot is not None:
        from atedm.lab.charts.cost import stage_chart

        save_image(stage_chart(report), plot)
    if as_json:
        beside = [vars(tome) | {name: report.with_tome(tome, name).as_dict() for name in CONVENTIONS} for tome in tomes]
        typer.echo(dumps(report.as_dict() | {"tome": beside}, indent=2))
        return
    typer.echo(cost_text(report, tomes) + (f"\n{plot}" if plot else ""))
