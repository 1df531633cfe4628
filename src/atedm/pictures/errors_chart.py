"""Where pruning errs and how its errors add up: a bar a block, and a line a method over the steps."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.evaluation.errors import ErrorsReport
from atedm.pictures.figure import FAINT_HEX, INK_HEX, picture_of

_COLOURS = ("#b3541e", "#e39a5b", "#9a9a9a", "#1f5fa8", "#7fb2e5", "#2f8f4e", "#8fc79f", "#8a6fb3")


def errors_chart(report: ErrorsReport, title: str = "") -> Image.Image:
    """Draw the error of every block over the run, and how far the image has been moved after every step.

    A dashed line of the same colour is where a method would be if errors of different steps had nothing to do with
    each other.

    Args:
        report: What was found.
        title: Above the plots.
    """
    figure = Figure(figsize=(11.4, 5.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    by_block, over_steps = figure.subplots(1, 2, width_ratios=(1.5, 1))
    names = [name for name in report.levels if any(name in method.blocks for method in report.methods)]
    width = 0.8 / len(report.methods)
    for index, (colour, method) in enumerate(zip(_COLOURS * len(report.methods), report.methods, strict=False)):
        heights = [_root(method.blocks.get(name, ())) for name in names]
        places = [i + (index + 0.5) * width - 0.4 for i in range(len(names))]
        again = index // len(_COLOURS)  # a colour that comes again is told by hatches and marks
        hatch = {"hatch": "///" * again, "edgecolor": "white", "linewidth": 0}
        by_block.bar(places, heights, width, color=colour, label=method.name, **hatch)
        steps = range(1, report.steps + 1)
        mark = {"marker": " os^Dv"[again % 6], "ms": 4, "color": colour}
        over_steps.plot(steps, method.moved, lw=1.8, **mark)
        over_steps.plot(steps, method.moved_if_independent, lw=1, ls="--", **mark)
    by_block.axhline(1, color=FAINT_HEX, lw=1, ls=":")
    by_block.set_xticks(range(len(names)), [_short(name, report.levels[name]) for name in names])
    by_block.set_title(
        "error of what a block adds, relative to it; 1 is as if it added nothing",
        loc="left",
        color=INK_HEX,
        fontsize=10,
    )
    over_steps.set_title("image moved by all errors so far, relative to it", loc="left", color=INK_HEX, fontsize=10)
    over_steps.set_xlabel("denoising steps done; dashed: were errors independent", color=INK_HEX)
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_steps.set_yscale("log")
    for plot in (by_block, over_steps):
        plot.spines[["top", "right"]].set_visible(False)
        plot.spines[["left", "bottom"]].set_color(FAINT_HEX)
        plot.tick_params(colors=INK_HEX, width=0.6, labelsize=8)
    figure.legend(frameon=False, loc="outside lower left", labelcolor=INK_HEX, fontsize=9, ncols=2)
    figure.suptitle(title, x=0.01, ha="left", color=INK_HEX, fontsize=11)
    return picture_of(figure)


def _short(block: str, level: int) -> str:
    """Fit the name of a block under its bars."""
    stage = block.partition("_block")[0]
    numbers = [part for part in block.split(".") if part.isdigit()]
    return f"{stage}\n{'.'.join(numbers)}\nlevel {level}"


def _root(values: tuple[float, ...]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5 if values else 0.0
