"""What `atedm cost` prints for people: the arithmetic of steps and blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from atedm.lab.tables import markdown_table

if TYPE_CHECKING:
    from atedm.costs.report import CostReport, Figures
    from atedm.costs.tome import ToMe
    from atedm.method.contract import Method

_UNITS = {"T": 1e12, "G": 1e9}


def cost_text(report: CostReport, tomes: Sequence[ToMe]) -> str:
    """Return what a step and a run cost, with settings of ToMe beside."""
    run, unit = report.figures(), _unit(report)
    return "\n\n".join(
        (
            _headline(report),
            _steps_table(report, tomes),
            _blocks_table(report),
            f"The method adds {report.overhead() / _UNITS[unit]:.3f} {unit} MACs to a normal step.\n"
            f"A run of {report.steps} steps: {report.steps * run.dense / _UNITS[unit]:.1f} {unit} MACs dense, "
            f"{report.steps * run.mean / _UNITS[unit]:.1f} pruned, a cost of {run.mean / run.dense:.1%} (exact).",
        )
    )


def _headline(report: CostReport) -> str:
    method: Method = report.method  # type: ignore[assignment]
    width, height = report.size
    calls = "with guidance" if report.guidance else "without guidance"
    return (
        f"{report.model}, {width} x {height} px, batch {report.batch} {calls}; {report.steps} steps, "
        f"{report.early_steps} of them early; {method.name}, rate {method.rate:.4g}"
    )


def _steps_table(report: CostReport, tomes: Sequence[ToMe]) -> str:
    from atedm.costs.spans import CONVENTIONS

    unit = _unit(report)

    def row(name: str, figures: Figures) -> list[str]:
        return [name, *(f"{macs / _UNITS[unit]:.3f}" for macs in figures), f"{figures.mean / figures.dense:.1%}"]

    name = report.method.name  # type: ignore[union-attr]
    rows = [row(f"{name}, {convention}", report.figures(convention)) for convention in CONVENTIONS]
    for tome in tomes:
        parts = "all parts" if tome.merge == "everything" else "self-attention"
        levels = "all levels" if tome.levels == "all" else "highest level"
        rows.append(row(f"ToMe {tome.ratio:.0%}, {parts}, {levels}", report.with_tome(tome)))
    return markdown_table([f"{unit} MACs of a step", "dense", "normal", "early", "mean", "cost"], rows)


def _blocks_table(report: CostReport) -> str:
    dense = report.figures().dense
    rows = [
        [
            span.shape.place.name,
            span.shape.place.layers,
            span.shape.tokens,
            f"{span.kept}{', early all' if span.spared else ''}",
            f"{100 * span.dense.exact / dense:.1f}",
            f"{100 * span.normal_step.exact / dense:.1f}",
        ]
        for span in report.spans
    ]
    what = "blocks" if report.spans[0].shape.place.is_stretch else "attention block"
    return markdown_table([what, "layers", "tokens", "kept", "dense, %", "normal, %"], rows)


def _unit(report: CostReport) -> str:
    return "T" if report.figures().dense >= _UNITS["T"] / 10 else "G"
