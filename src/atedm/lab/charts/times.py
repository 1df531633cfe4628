"""Times: what each method takes beside dense, and what the parts of AT-EDM take in a run."""

from matplotlib import colormaps
from PIL import Image

from atedm.lab.bench.bench import BenchReport
from atedm.lab.plotting.figure import FAINT_HEX, INK_HEX, legend_beside, new_charts, picture_of, rows_named
from atedm.lab.probes.latency import LatencyReport

_BESIDE = {"textcoords": "offset points", "va": "center", "color": INK_HEX, "fontsize": 9}
"""How notes beside bars are set."""


def bench_chart(report: BenchReport) -> Image.Image:
    """Draw the time of each method as a bar, a line from its lowest ratio to its highest, and a mark at its cost."""
    figure, (axes,) = new_charts(9.6, 1.6 + 0.42 * len(report.rows), title=report.headline())
    bar, mark = (colormaps["viridis"](at) for at in (0.55, 0.15))
    ends = [max(row.ratio.high, row.cost) for row in report.rows.values()]
    for place, (row, end) in enumerate(zip(report.rows.values(), ends, strict=True)):
        axes.barh(place, row.ratio.median, color=bar, height=0.6, label="" if place else "time")
        axes.plot([row.ratio.low, row.ratio.high], [place, place], color=INK_HEX, lw=1.2)
        axes.plot([row.cost], [place], "|", color=mark, ms=15, mew=2.2, label="" if place else "cost")
        note, box = f"{row.ratio.median:.3f}, {row.time.median:.4g} ms", {"fc": "white", "ec": "none", "pad": 1}
        axes.annotate(note, (end, place), (7, 0), bbox=box, **_BESIDE)
    axes.axvline(1, color=FAINT_HEX, lw=0.8, ls="--", zorder=0)
    rows_named(axes, list(report.rows))
    axes.set(xlim=(0, 1.22 * max(ends)), xlabel=f"of the dense {report.timed}")
    legend_beside(axes)
    return picture_of(figure)


def latency_chart(report: LatencyReport) -> Image.Image:
    """Draw a bar of the parts for each way to the attention map that was timed, as supplement Fig. 4.

    The dense run is a line only where it is in sight: drawn to scale, it would leave none of the parts to see.
    """
    edge = 1.25 * max(sum(run.values()) for run in report.ways.values())
    figure, (axes,) = new_charts(8.6, 2.0 + 0.55 * len(report.ways), title=report.headline())
    for row, run in enumerate(report.ways.values()):
        end = 0.0
        for place, (part, time) in enumerate(run.items()):
            colour = colormaps["viridis"](0.12 + 0.8 * place / (len(run) - 1))
            axes.barh(row, time, left=end, color=colour, height=0.6, label="" if row else part)
            end += time
        axes.annotate(f"{end:.0f} ms\n{end / report.dense_run:.1%} of dense", (end, row), (6, 0), **_BESIDE)
    rows_named(axes, list(report.ways))
    if report.dense_run < edge:
        axes.axvline(report.dense_run, color=FAINT_HEX, lw=1, ls="--")
    axes.set(xlim=(0, edge), xlabel=f"ms in a run of {report.steps} steps; dense {report.dense_run:.0f} ms")
    legend_beside(axes)
    return picture_of(figure)
