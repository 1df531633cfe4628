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
    from atedm.costs.report import CostReport, Figures
    from atedm.costs.tome import ToMe

TOME, MEMORY = "ToMe", "Memory"
UNITS = {"T": 1e12, "G": 1e9}


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
        content = report.as_dict() | {"tome": [_tome_as_dict(report, setting) for setting in _tome_settings(ratio)]}
        content["memory"] = None if footprint is None else footprint.as_dict()
        typer.echo(json.dumps(content, indent=2))
    else:
        _show(report, footprint, ratio)
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


def _tome_settings(ratio: float) -> list[ToMe]:
    from atedm.costs.tome import LEVELS, MERGES, ToMe

    return [ToMe(ratio, merge, levels) for levels in LEVELS for merge in MERGES]


def _tome_as_dict(report: CostReport, tome: ToMe) -> dict[str, Any]:
    from dataclasses import asdict

    from atedm.costs.formula import CONVENTIONS
    from atedm.costs.report import figures_as_dict

    return asdict(tome) | {name: figures_as_dict(report.with_tome(tome, name)) for name in CONVENTIONS}


# --- for people -------------------------------------------------------------------------------------------------------


def _show(report: CostReport, memory: MemoryReport | None, ratio: float) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    width, height = report.size
    calls = "with guidance, two halves of a U-Net call an image" if report.guidance else "without guidance"
    console.print(
        f"[bold]{escape(report.model)}[/], {width} x {height} px, batch {report.batch} {calls}; {report.steps} steps, "
        f"{report.prune_less_steps} of them prune-less; {_name(report)}",
        highlight=False,
    )
    console.print(_figures_table(report, ratio), _stages_table(report), _blocks_table(report))
    if memory is not None:
        console.print(_memory_table(memory))
    run, unit = report.figures(), _unit(report)
    console.print(
        f"A run of {report.steps} steps: {report.steps * run.dense / UNITS[unit]:.1f} {unit} MACs dense, "
        f"{report.steps * run.mean / UNITS[unit]:.1f} pruned, saving {run.saving_mean:.1%} (exact).",
        highlight=False,
    )


def _name(report: CostReport) -> str:
    from atedm.config import PruningConfig

    method = report.method
    if isinstance(method, PruningConfig):
        if method.gradual:
            return f"{method.method_name}, several pruning layers a block"
        return f"{method.method_name}, pruning rate {method.pruning_rate:.4g}, {method.place.replace('-', ' ')}"
    return f"ToMe, ratio {method.ratio:.4g} of {method.merge}, {method.levels} levels"


def _figures_table(report: CostReport, ratio: float) -> Any:
    from atedm.config import PruningConfig
    from atedm.costs.formula import CONVENTIONS

    unit = _unit(report)
    table = _table(f"{unit} MACs of a step", "dense", "normal", "prune-less", "mean", "saved", "in mean")
    ours = report.method.method_name if isinstance(report.method, PruningConfig) else f"ToMe {report.method.ratio:.0%}"
    for convention in CONVENTIONS:
        _figures_row(table, f"{ours}, {convention}", report.figures(convention), unit)
    table.add_section()
    for tome in _tome_settings(ratio):
        what = "SA+CA+FF" if tome.merge == "everything" else "SA"
        where = "all levels" if tome.levels == "all" else "highest"
        _figures_row(table, f"ToMe {what}, {where}", report.with_tome(tome), unit)
    parts = ("map", "ranking", "matching")
    overhead = [f"{part} {getattr(report.overhead(), part) / UNITS[unit]:.3f}" for part in parts]
    table.caption = f"Overhead in the exact normal step: {', '.join(overhead)}. ToMe is at {ratio:.0%}, exact."
    return table


def _unit(report: CostReport) -> str:
    return "T" if report.figures().dense >= UNITS["T"] / 10 else "G"


def _figures_row(table: Any, name: str, figures: Figures, unit: str) -> None:
    values = [f"{value / UNITS[unit]:.3f}" for value in figures]
    table.add_row(name, *values, f"{figures.saving_normal:.1%}", f"{figures.saving_mean:.1%}")


def _stages_table(report: CostReport) -> Any:
    table = _table("% of the dense step, exact", "ResNet", "other", "attention", "normal", "prune-less")
    dense = report.figures().dense
    totals = [0.0] * 5
    for stage in report.stages:
        blocks = [block for block in report.blocks if block.shape.place.name.startswith(f"{stage.name}.")]
        sums = [sum(getattr(b, kind).exact for b in blocks) for kind in ("dense", "normal_step", "prune_less_step")]
        shares = [100 * value / dense for value in (stage.resnet, stage.other, *sums)]
        totals = [total + share for total, share in zip(totals, shares, strict=True)]
        table.add_row(stage.name, *(f"{share:.1f}" for share in shares))
    table.add_section()
    table.add_row("all stages", *(f"{total:.1f}" for total in totals))
    return table


def _blocks_table(report: CostReport) -> Any:
    table = _table("attention block, exact %", "level", "layers", "tokens", "kept", "spared", "dense", "normal")
    dense = report.figures().dense
    for block in report.blocks:
        shape = block.shape
        table.add_row(
            shape.place.name,
            str(shape.place.level),
            str(shape.place.layers),
            str(shape.tokens),
            str(block.kept),
            "yes" if block.spared else "",
            f"{100 * block.dense.exact / dense:.1f}",
            f"{100 * block.normal_step.exact / dense:.1f}",
        )
    return table


def _memory_table(memory: MemoryReport) -> Any:
    table = _table("activations, MiB", "dense", "normal", "prune-less")
    steps = (memory.dense, memory.normal_step, memory.prune_less_step)
    table.add_row("peak", *(f"{step.peak / 2**20:.1f}" for step in steps))
    table.add_row("average over the step", *(f"{step.average / 2**20:.1f}" for step in steps))
    keeping = memory.more_jobs_if_dense_keeps_all
    table.caption = (
        f"{memory.dense.basis}; freed at once; weights {memory.weights / 2**20:.0f} MiB.\n"
        f"More jobs in the same memory, over a run: {memory.more_jobs:+.1%}; each with its own weights "
        f"{memory.more_jobs_with_weights:+.1%}"
        + (f";\nif the dense model alone gave nothing back, {keeping:+.1%}." if keeping is not None else ".")
    )
    return table


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table
