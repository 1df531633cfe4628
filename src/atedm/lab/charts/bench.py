"""What each method takes beside its cost, dense being 1."""

from __future__ import annotations

from matplotlib import colormaps
from PIL import Image

from atedm.lab.bench.bench import BenchReport
from atedm.lab.charts.figure import FAINT_HEX, INK_HEX, legend_beside, new_chart, picture_of, rows_named


def bench_chart(report: BenchReport) -> Image.Image:
    """Draw the time of each method as a bar, a line from its lowest ratio to its highest, and a mark at its cost."""
    figure, axes = new_chart(9.6, 1.6 + 0.42 * len(report.rows), report.headline())
    bar, mark = (colormaps["viridis"](at) for at in (0.55, 0.15))
    for place, row in enumerate(report.rows.values()):
        axes.barh(place, row.ratio.median, color=bar, height=0.6, label="" if place else "time")
        axes.plot([row.ratio.low, row.ratio.high], [place, place], color=INK_HEX, lw=1.2)
        axes.plot([row.cost], [place], "|", color=mark, ms=15, mew=2.2, label="" if place else "cost")
        axes.annotate(
            f"{row.ratio.median:.3f}, {row.time.median:.4g} ms",
            (max(row.ratio.high, row.cost), place),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=INK_HEX,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.axvline(1, color=FAINT_HEX, lw=0.8, ls="--", zorder=0)
    rows_named(axes, list(report.rows))
    axes.set_xlim(0, 1.22 * max(max(row.ratio.high, row.cost) for row in report.rows.values()))
    axes.set_xlabel(f"of the dense {report.timed}", color=INK_HEX)
    legend_beside(axes)
    return picture_of(figure)
