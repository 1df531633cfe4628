"""Variance of the attention maps over a run, drawn as the paper's Fig. 5."""

from __future__ import annotations

from itertools import chain

from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.lab.charts.figure import FAINT_HEX, INK_HEX, legend_beside, new_chart, picture_of
from atedm.lab.probes.variance import EARLY_SHARE, THRESHOLD, VarianceReport


def variance_chart(report: VarianceReport, threshold: float = THRESHOLD, title: str = "") -> Image.Image:
    """Draw a line a level and their mean, the threshold, and where the paper stops to prune less."""
    figure, axes = new_chart(8, 4.2, title)
    steps = range(report.steps)
    marker = "o" if report.steps <= 12 else ""
    tokens = {row.level: row.tokens for row in report.rows}
    by_level, mean = report.mean_by_level(), report.mean_by_step()
    lines = []
    for place, (level, values) in enumerate(by_level.items()):
        colour = colormaps["viridis"](0.25 + 0.55 * place / max(1, len(by_level) - 1))
        label = f"level {level}, {tokens[level]} tokens"
        lines += axes.plot(steps, values, color=colour, lw=1.6, marker=marker, ms=4, label=label)
    lines += axes.plot(steps, mean, color=INK_HEX, lw=2.2, marker=marker, ms=4, label="mean over the blocks")
    # A flat run would get an axis of less than a decade, on which no tick has a number.
    drawn = [value for value in chain(mean, *by_level.values(), [threshold]) if value > 0]
    axes.set_ylim(min(drawn) / 2.5, max(drawn) * 2.5)
    axes.set_yscale("log")
    axes.set_xlim(-0.02 * report.steps, max(report.steps - 1, 1) + 0.02 * report.steps)
    lines.append(axes.axhline(threshold, color=FAINT_HEX, lw=1, ls="--", label=f"threshold {threshold:g}"))
    early = f"{EARLY_SHARE:.0%} of the run"
    lines.append(axes.axvline(EARLY_SHARE * report.steps, color=FAINT_HEX, lw=1, ls=":", label=early))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("denoising steps done", color=INK_HEX)
    axes.set_ylabel("variance of attention maps", color=INK_HEX)
    legend_beside(axes, handles=lines)
    return picture_of(figure)
