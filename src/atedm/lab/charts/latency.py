"""Time of the parts of AT-EDM in a run, drawn as supplement Fig. 4, against the dense run."""

from __future__ import annotations

from matplotlib import colormaps
from PIL import Image

from atedm.lab.charts.figure import FAINT_HEX, INK_HEX, legend_beside, new_chart, picture_of, rows_named
from atedm.lab.probes.latency import LatencyReport


def latency_chart(report: LatencyReport) -> Image.Image:
    """Draw a bar of the parts for each way to the attention map that was timed.

    The dense run is a line only where it is in sight: drawn to scale, it would leave none of the parts to see.
    """
    longest = max(sum(run.values()) for run in report.ways.values())
    figure, axes = new_chart(8.6, 2.0 + 0.55 * len(report.ways), report.headline())
    for row, run in enumerate(report.ways.values()):
        end = 0.0
        for place, (part, time) in enumerate(run.items()):
            colour = colormaps["viridis"](0.12 + 0.8 * place / (len(run) - 1))
            axes.barh(row, time, left=end, color=colour, height=0.6, label="" if row else part)
            end += time
        label = f"{end:.0f} ms\n{end / report.dense_run:.1%} of dense"
        axes.annotate(label, (end, row), (6, 0), textcoords="offset points", va="center", color=INK_HEX, fontsize=9)
    rows_named(axes, list(report.ways))
    axes.set_xlim(0, 1.25 * longest)
    if report.dense_run < 1.25 * longest:
        axes.axvline(report.dense_run, color=FAINT_HEX, lw=1, ls="--")
    axes.set_xlabel(f"ms in a run of {report.steps} steps; dense {report.dense_run:.0f} ms", color=INK_HEX)
    legend_beside(axes)
    return picture_of(figure)
