"""How well rankings find the objects, step by step: a plot a feature level."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.lab.charts.figure import FAINT_HEX, INK_HEX, legend_beside, marks, new_charts, picture_of
from atedm.lab.probes.objects import ObjectsReport


def objects_chart(report: ObjectsReport, title: str = "") -> Image.Image:
    """Draw the AUC of every ranking over the steps, one plot a level, on one scale."""
    levels = report.levels
    figure, plots = new_charts(3.4 * len(levels) + 2.6, 3.8, len(levels), title, sharey=True)
    styles = marks(report.rankings)
    for plot, level in zip(plots, levels, strict=True):
        for ranking in report.rankings:
            values = [report.mean("auc", ranking=ranking, level=level, step=step) for step in range(report.steps)]
            plot.plot(range(report.steps), values, lw=1.8, ms=3, label=ranking, **styles[ranking])
        plot.axhline(0.5, color=FAINT_HEX, lw=1, ls="--")
        plot.set_title(f"level {level}", loc="left", color=INK_HEX, fontsize=10)
        plot.set_xlabel("denoising step", color=INK_HEX)
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        plot.set_ylim(0, 1)
    plots[0].set_ylabel("an object's token ranks higher, share", color=INK_HEX)
    legend_beside(plots[-1])
    return picture_of(figure)
