"""`atedm cost`: what a model saves at a size, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.options import BudgetOption, PresetOption, RateOption, at_least_one, budget_share, parse_size

if TYPE_CHECKING:
    from atedm.config import PruningConfig
    from atedm.costs.memory import MemoryReport
    from atedm.costs.report import CostReport
    from atedm.costs.tome import ToMe

TOME, MEMORY = "ToMe", "Memory"


def cost(
    model: Annotated[
        str,
        typer.Option(
            help="**sdxl**, **sdxl-turbo**, **sd15**, **sd21** or **tiny**, which need no download; a diffusers "
            "folder or a hub id, of which only the config is read.",
            rich_help_panel="Model",
        ),
    ] = "sdxl",
    size: Annotated[
        str | None, typer.Option(help="WxH in pixels; by default the model's own.", rich_help_panel="Model")
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Images made at once.", rich_help_panel="Model", callback=at_least_one)
    ] = 1,
    guidance: Annotated[
        bool | None,
        typer.Option(
            "--guidance/--no-guidance",
            help="With guidance an image is two halves of a U-Net call; by default what suits the model.",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps; 50, or 4 for few-step models.", rich_help_panel="Model", callback=at_least_one
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="**at-edm** or **tome**.", rich_help_panel="Pruning")] = "at-edm",
    preset: PresetOption = None,
    pruning_rate: RateOption = None,
    place: Annotated[
        str | None,
        typer.Option(
            help="Where tokens are dropped: **after-feed-forward** (the paper's), **before-feed-forward**, "
            "**after-self-attention**, the default where blocks have one layer, or **before-self-attention**.",
            rich_help_panel="Pruning",
        ),
    ] = None,
    map_mode: Annotated[
        str | None,
        typer.Option(
            help="Way to the attention map: **auto**, **full** (the paper's), **blocked**, **flash**, **triton** or "
            "**sampled**.",
            rich_help_panel="Pruning",
        ),
    ] = None,
    budget: BudgetOption = None,
    tmacs: Annotated[
        float | None, typer.Option(help="A budget in T MACs for one image's step.", rich_help_panel="Pruning")
    ] = None,
    of: Annotated[
        str, typer.Option(help="What the budget is for: **mean** or **normal-step**.", rich_help_panel="Pruning")
    ] = "mean",
    convention: Annotated[
        str, typer.Option(help="How the budget is counted: **exact** or **paper**.", rich_help_panel="Pruning")
    ] = "exact",
    ratio: Annotated[
        float, typer.Option(help="Share of the tokens that ToMe merges, up to 0.75.", rich_help_panel=TOME)
    ] = 0.5,
    merge: Annotated[str, typer.Option(help="**everything** or **self-attention**.", rich_help_panel=TOME)] = (
        "everything"
    ),
    levels: Annotated[str, typer.Option(help="**all** feature levels or the **highest**.", rich_help_panel=TOME)] = (
        "all"
    ),
    memory: Annotated[
        str,
        typer.Option(
            help="**traced** without computing, **measured** here with random weights, or **none**.",
            rich_help_panel=MEMORY,
        ),
    ] = "traced",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of weights and activations: **float16**, **bfloat16**, **float32**.", rich_help_panel=MEMORY
        ),
    ] = "float16",
    attention: Annotated[
        str,
        typer.Option(help="**fused**, or **plain** with whole attention maps; traced only.", rich_help_panel=MEMORY),
    ] = "fused",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the cost of each stage to this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Say what a model costs at a size and what pruning saves, without its weights.

    Multiply-accumulates (MACs) of one denoising step and of a run, in two conventions: **exact** is everything that
    torch counts, overheads of pruning included; **paper** is Linear and convolution plus self-attention, as the paper
    counts, without overheads.

    Examples:
    `atedm cost` is SDXL at 1024 px with the paper's setting.

    `atedm cost --model sdxl --preset dagger --size 2048x2048`

    `atedm cost --budget 0.7` solves for the pruning rate at which a run costs 70 % of the dense one.

    `atedm cost --method tome --ratio 0.5`
    """
    from rich.console import Console
    from rich.markup import escape

    from atedm.choices import check_name
    from atedm.cli.cost_tables import show_costs, tome_settings
    from atedm.costs.report import cost as cost_of
    from atedm.costs.tome import ToMe
    from atedm.files import check_writable
    from atedm.pipelines import quiet_libraries

    check_writable(plot)
    quiet_libraries()
    check_name("method", method, ("at-edm", "tome"))
    check_name("memory", memory, ("traced", "measured", "none"))
    check_name("dtype", dtype, ("float16", "bfloat16", "float32"))
    check_name("attention", attention, ("fused", "plain"))
    check_name("of", of, ("mean", "normal-step"))
    check_name("convention", convention, ("exact", "paper"))
    if method == "tome":
        theirs = {"--preset": preset, "--pruning-rate": pruning_rate, "--place": place, "--map-mode": map_mode}
        if given := [name for name, value in theirs.items() if value is not None]:
            raise ValueError(f"ToMe has no {', '.join(given)}; its amount is --ratio")
    width, height = parse_size(size)
    pixels = None if width is None or height is None else (width, height)
    tome = ToMe(ratio, merge, levels)
    chosen: PruningConfig | ToMe = tome if method == "tome" else _config(model, preset, pruning_rate, place, map_mode)
    if tmacs is not None and pruning_rate is not None:
        raise ValueError("give --tmacs or --pruning-rate, not both: a budget is solved for its rate")
    if budget_share(budget, pruning_rate) is not None or tmacs is not None:
        from atedm.costs.fit import fit_to_budget
        from atedm.pipelines import habits

        chosen = fit_to_budget(
            model,
            chosen,
            share=budget,
            tmacs=tmacs,
            size=pixels,
            guidance=guidance,
            of=of,
            steps=habits(model).steps if steps is None else steps,
            convention=convention,
        )
    with Console(stderr=True).status(f"counting {escape(model)}"):
        report = cost_of(model, chosen, size=pixels, batch=batch, guidance=guidance, steps=steps)
        footprint = _memory(report, memory, dtype, attention)
    if plot is not None:
        _draw(report, plot)
    if as_json:
        content = report.as_dict() | {"tome": [_tome_as_dict(report, setting) for setting in tome_settings(ratio)]}
        content["memory"] = None if footprint is None else footprint.as_dict()
        typer.echo(json.dumps(content, indent=2))
    else:
        show_costs(report, footprint, ratio)
        if plot is not None:
            typer.echo(str(plot))


def _config(
    model: str, preset_name: str | None, pruning_rate: float | None, place: str | None, map_mode: str | None
) -> PruningConfig:
    from atedm.config import preset
    from atedm.costs.report import suiting

    config = suiting(model) if preset_name is None else preset(preset_name)
    changes: dict[str, Any] = {"pruning_rate": pruning_rate, "place": place, "map_mode": map_mode}
    return config.replace(**{name: value for name, value in changes.items() if value is not None})


def _memory(report: CostReport, kind: str, dtype: str, attention: str) -> MemoryReport | None:
    import torch

    from atedm.costs.memory import memory
    from atedm.pipelines import best_device

    if kind == "none":
        return None
    return memory(
        report.model,
        report.method,
        size=report.size,
        batch=report.batch,
        guidance=report.guidance,
        steps=report.steps,
        dtype=getattr(torch, dtype),
        attention=attention,
        device=best_device() if kind == "measured" else None,
    )


def _draw(report: CostReport, file: Path) -> None:
    from atedm.files import save_image
    from atedm.pictures.cost_chart import stage_chart

    save_image(stage_chart(report), file)


def _tome_as_dict(report: CostReport, tome: ToMe) -> dict[str, Any]:
    from dataclasses import asdict

    from atedm.costs.formula import CONVENTIONS
    from atedm.costs.report import figures_as_dict

    return asdict(tome) | {name: figures_as_dict(report.with_tome(tome, name)) for name in CONVENTIONS}
