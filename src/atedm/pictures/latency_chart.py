"""Time of the parts of pruning in a run, drawn as supplement Fig. 4, against the dense run."""

from __future__ import annotations

from functools import partial
from operator import mul

from matplotlib import colormaps
from PIL import Image

from atedm.costs.latency import LatencyReport
from atedm.costs.pruning_parts import PARTS
from atedm.pictures.figure import FAINT_HEX, INK_HEX, new_chart, picture_of


def latency_chart(report: LatencyReport) -> Image.Image:
    """Draw a bar of the parts for each way to the attention map that was timed.

    Below is the time of a run, above the same as a share of the dense run. The dense run is a line only where it is in
    sight: drawn to scale as a bar, it would leave none of the parts to see.

    Args:
        report: What was measured.
    """
    timed = {name: way.run for name, way in report.ways.items() if way.run}
    longest = max(sum(run.values()) for run in timed.values())
    unit, size = ("s", 1e3) if longest > 1e4 else ("ms", 1.0)
    dense = report.dense_run / size
    figure, axes = new_chart(8.6, 2.0 + 0.55 * len(timed))
    for row, run in enumerate(timed.values()):
        end = 0.0
        for place, part in enumerate(PARTS):
            colour = colormaps["viridis"](0.12 + 0.8 * place / (len(PARTS) - 1))
            axes.barh(row, run[part] / size, left=end, color=colour, height=0.6, label="" if row else part)
            end += run[part] / size
        label = f"{end:.0f} {unit}\n{end / dense:.1%} of dense"
        axes.annotate(label, (end, row), (6, 0), textcoords="offset points", va="center", color=INK_HEX, fontsize=9)
    axes.set_yticks(range(len(timed)), list(timed))
    axes.set_ylim(len(timed) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.25 * longest / size)
    if dense < 1.25 * longest / size:
        axes.axvline(dense, color=FAINT_HEX, lw=1, ls="--")
    axes.set_xlabel(f"{unit} in a run of {report.steps} steps", color=INK_HEX)
    share = axes.secondary_xaxis("top", functions=(partial(mul, 100 / dense), partial(mul, dense / 100)))
    share.set_xlabel(f"% of the dense run, {dense:.0f} {unit}", color=INK_HEX)
    share.spines["top"].set_color(FAINT_HEX)
    share.tick_params(colors=INK_HEX, width=0.6)
    figure.suptitle(report.headline(), x=0.01, ha="left", color=FAINT_HEX, fontsize=9, wrap=True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelcolor=INK_HEX)
    return picture_of(figure)
