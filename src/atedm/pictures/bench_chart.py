"""What each method takes beside what its arithmetic says, dense being 1."""

from __future__ import annotations

from matplotlib import colormaps
from PIL import Image

from atedm.bench.report import BenchReport
from atedm.pictures.figure import FAINT_HEX, INK_HEX, new_chart, picture_of


def bench_chart(report: BenchReport) -> Image.Image:
    """Draw the time of each method as a bar, a line from its lowest ratio to its highest, and a mark at its arithmetic.

    Args:
        report: What was timed.
    """
    figure, axes = new_chart(9.6, 1.6 + 0.42 * len(report.rows))
    bar, mark = (colormaps["viridis"](at) for at in (0.55, 0.15))
    unit, size = ("s", 1e3) if report.rows["dense"].time.median > 1e3 else ("ms", 1.0)
    for place, row in enumerate(report.rows.values()):
        axes.barh(place, row.ratio.median, color=bar, height=0.6, label="" if place else "time")
        axes.plot([row.ratio.low, row.ratio.high], [place, place], color=INK_HEX, lw=1.2)
        label = "" if place else "arithmetic"
        axes.plot([row.arithmetic], [place], "|", color=mark, ms=15, mew=2.2, label=label)
        end = max(row.ratio.high, row.arithmetic)
        text = f"{row.ratio.median:.3f}, {row.time.median / size:.3g} {unit}"
        over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(
            text,
            (end, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=INK_HEX,
            fontsize=9,
            bbox=over_the_line,
        )
    axes.axvline(1, color=FAINT_HEX, lw=0.8, ls="--", zorder=0)
    axes.set_yticks(range(len(report.rows)), list(report.rows))
    axes.set_ylim(len(report.rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.22 * max(max(row.ratio.high, row.arithmetic) for row in report.rows.values()))
    axes.set_xlabel(f"of the dense {report.timed}", color=INK_HEX)
    figure.suptitle(report.headline(), x=0.01, ha="left", color=FAINT_HEX, fontsize=8, wrap=True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelcolor=INK_HEX)
    return picture_of(figure)
