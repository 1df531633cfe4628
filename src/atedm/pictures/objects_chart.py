"""How well rankings find the objects, step by step: a plot a feature level."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.evaluation.objects import ObjectsReport
from atedm.pictures.figure import FAINT_HEX, INK_HEX, picture_of

_COLOURS = (
    "#1f5fa8",
    "#7fb2e5",
    "#b3541e",
    "#e39a5b",
    "#8a6fb3",
    "#c9b6e0",
    "#9a9a9a",
    "#c9c9c9",
    "#d5c26a",
    "#8fc79f",
    "#2f8f4e",
)


def objects_chart(report: ObjectsReport, title: str = "") -> Image.Image:
    """Draw the AUC of every ranking over the steps, one plot a level, on one scale.

    Args:
        report: What was found.
        title: Above the plots.
    """
    levels = report.levels
    figure = Figure(figsize=(3.4 * len(levels) + 2.6, 3.8), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for plot, level in zip(axes, levels, strict=True):
        for colour, ranking in zip(_COLOURS * len(report.rankings), report.rankings, strict=False):
            values = [report.mean("auc", ranking=ranking, level=level, step=step) for step in range(report.steps)]
            plot.plot(range(report.steps), values, color=colour, lw=1.8, label=ranking)
        plot.axhline(0.5, color=FAINT_HEX, lw=1, ls="--")
        plot.set_title(f"level {level}", loc="left", color=INK_HEX, fontsize=10)
        plot.set_xlabel("denoising step", color=INK_HEX)
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        plot.set_ylim(0, 1)
        plot.spines[["top", "right"]].set_visible(False)
        plot.spines[["left", "bottom"]].set_color(FAINT_HEX)
        plot.tick_params(colors=INK_HEX, width=0.6)
    axes[0].set_ylabel("an object's token ranks higher, share", color=INK_HEX)
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK_HEX, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", color=INK_HEX, fontsize=11)
    return picture_of(figure)
