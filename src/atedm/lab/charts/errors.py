"""Where pruning errs and how its errors add up: a bar a block, and a line a method over the steps."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.lab.charts.figure import FAINT_HEX, INK_HEX, marks, new_charts, picture_of
from atedm.lab.probes.errors import ErrorsReport, root_mean_square


def errors_chart(report: ErrorsReport, title: str = "") -> Image.Image:
    """Draw the error of every block over the run, and how far the image has been moved after every step.

    A dashed line of the same colour is where a method would be if errors of different steps were independent.
    """
    figure, (by_block, over_steps) = new_charts(11.4, 5.4, 2, title, width_ratios=(1.5, 1))
    names = [name for name in report.levels if any(name in method.blocks for method in report.methods)]
    width = 0.8 / len(report.methods)
    styles = marks([method.name for method in report.methods])
    steps = range(1, report.steps + 1)
    for index, method in enumerate(report.methods):
        heights = [root_mean_square(method.blocks.get(name, ())) for name in names]
        places = [i + (index + 0.5) * width - 0.4 for i in range(len(names))]
        by_block.bar(places, heights, width, color=styles[method.name]["color"], label=method.name)
        over_steps.plot(steps, method.moved, lw=1.8, ms=3, **styles[method.name])
        over_steps.plot(steps, method.moved_if_independent, lw=1, ls="--", ms=3, **styles[method.name])
    by_block.axhline(1, color=FAINT_HEX, lw=1, ls=":")
    by_block.set_xticks(range(len(names)), [_short(name, report.levels[name]) for name in names], fontsize=8)
    titles = {
        by_block: "error of what a block adds, relative to it; 1 is as if it added nothing",
        over_steps: "image moved by all errors so far, relative to it",
    }
    for plot, text in titles.items():
        plot.set_title(text, loc="left", color=INK_HEX, fontsize=10)
    over_steps.set_xlabel("denoising steps done; dashed: were errors independent", color=INK_HEX)
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_steps.set_yscale("log")
    figure.legend(frameon=False, loc="outside lower left", labelcolor=INK_HEX, fontsize=9, ncols=2)
    return picture_of(figure)


def _short(block: str, level: int) -> str:
    """Fit the name of a block under its bars."""
    numbers = [part for part in block.split(".") if part.isdigit()]
    return f"{block.partition('_block')[0]}\n{'.'.join(numbers)}\nlevel {level}"
