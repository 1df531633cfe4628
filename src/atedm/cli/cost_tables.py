"""What `atedm cost` prints for people: tables of arithmetic by convention, stage and block, and of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atedm.costs.memory import MemoryReport
    from atedm.costs.report import CostReport, Figures
    from atedm.costs.tome import ToMe

UNITS = {"T": 1e12, "G": 1e9}


def tome_settings(ratio: float) -> list[ToMe]:
    """Return ToMe at a ratio in every way it may merge."""
    from atedm.costs.tome import LEVELS, MERGES, ToMe

    return [ToMe(ratio, merge, levels) for levels in LEVELS for merge in MERGES]


def show_costs(report: CostReport, memory: MemoryReport | None, ratio: float) -> None:
    """Print what a step and a run cost, with ToMe at ``ratio`` beside, and memory where it was asked for."""
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
    for tome in tome_settings(ratio):
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
