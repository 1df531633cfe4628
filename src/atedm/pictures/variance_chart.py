"""Variance of the attention maps over a run, drawn as the paper's Fig. 5."""

from __future__ import annotations

from itertools import chain
from typing import Any

from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.costs.variance import PRUNE_LESS_SHARE, THRESHOLD, VarianceReport
from atedm.pictures.figure import FAINT_HEX, INK_HEX, new_chart, picture_of


def variance_chart(report: VarianceReport, threshold: float = THRESHOLD, title: str = "") -> Image.Image:
    """Draw a line a level and their mean, the threshold, and where the paper stops to prune less.

    Args:
        report: What was measured.
        threshold: A line across.
        title: Above the plot.
    """
    figure, axes = new_chart(8, 4.2)
    steps = range(report.steps)
    marker = "o" if report.steps <= 12 else ""
    tokens = {row.level: row.tokens for row in report.rows}
    by_level = report.mean_by_level()
    mean = report.mean_by_step()
    lines = []
    ends = [*(values[-1] for values in by_level.values()), mean[-1]]
    for place, (level, values) in enumerate(by_level.items()):
        colour = colormaps["viridis"](0.25 + 0.55 * place / max(1, len(by_level) - 1))
        label = f"level {level}, {tokens[level]} tokens"
        lines += axes.plot(steps, values, color=colour, lw=1.6, marker=marker, ms=4, label=label)
    lines += axes.plot(steps, mean, color=INK_HEX, lw=2.2, marker=marker, ms=4, label="mean over the blocks")
    # A flat run would get an axis of less than a decade, on which no tick has a number.
    drawn = [value for value in chain(mean, *by_level.values(), [threshold]) if value > 0]
    axes.set_ylim(min(drawn) / 2.5, max(drawn) * 2.5)
    axes.set_yscale("log")
    margin = 0.02 * report.steps
    axes.set_xlim(-margin, max(report.steps - 1, 1) + margin)
    axes.axhline(threshold, color=FAINT_HEX, lw=1, ls="--")
    axes.axvline(PRUNE_LESS_SHARE * report.steps, color=FAINT_HEX, lw=1, ls=":")
    beside: dict[str, Any] = {"color": FAINT_HEX, "fontsize": 9, "textcoords": "offset points"}
    axes.annotate(
        f"threshold {threshold:g}", (1, threshold), (-2, 3), xycoords=("axes fraction", "data"), ha="right", **beside
    )
    share = f"{PRUNE_LESS_SHARE:.0%} of the run"
    axes.annotate(share, (PRUNE_LESS_SHARE * report.steps, 1), (4, -9), xycoords=("data", "axes fraction"), **beside)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("denoising steps done", color=INK_HEX)
    axes.set_ylabel("variance of attention maps", color=INK_HEX)
    axes.set_title(title, loc="left", color=INK_HEX, fontsize=11)
    # In the order the lines end in, so that the eye need not search.
    lines = [line for _, line in sorted(zip(ends, lines, strict=True), key=lambda pair: -pair[0])]
    axes.legend(handles=lines, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK_HEX)
    return picture_of(figure)
