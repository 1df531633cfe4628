"""What the probes see over the steps of a run: variance of attention maps, errors of pruning, objects found."""

from itertools import chain

from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image

from atedm.lab.plotting.figure import FAINT_HEX, INK_HEX, headed, legend_beside, marks, new_charts, picture_of
from atedm.lab.probes.errors import ErrorsReport, root_mean_square
from atedm.lab.probes.objects import ObjectsReport
from atedm.lab.probes.variance import EARLY_SHARE, THRESHOLD, VarianceReport


def variance_chart(report: VarianceReport, threshold: float = THRESHOLD, title: str = "") -> Image.Image:
    """Draw a line a level and their mean, the threshold, and where the paper stops to prune less (its Fig. 5)."""
    figure, (axes,) = new_charts(8, 4.2, title=title)
    steps = range(report.steps)
    style = {"marker": "o" if report.steps <= 12 else "", "ms": 4}
    tokens = {row.level: row.tokens for row in report.rows}
    by_level, mean = report.mean_by_level(), report.mean_by_step()
    lines = []
    for place, (level, values) in enumerate(by_level.items()):
        colour = colormaps["viridis"](0.25 + 0.55 * place / max(1, len(by_level) - 1))
        label = f"level {level}, {tokens[level]} tokens"
        lines += axes.plot(steps, values, color=colour, lw=1.6, label=label, **style)
    lines += axes.plot(steps, mean, color=INK_HEX, lw=2.2, label="mean over the blocks", **style)
    lines.append(axes.axhline(threshold, color=FAINT_HEX, lw=1, ls="--", label=f"threshold {threshold:g}"))
    early = f"{EARLY_SHARE:.0%} of the run"
    lines.append(axes.axvline(EARLY_SHARE * report.steps, color=FAINT_HEX, lw=1, ls=":", label=early))
    # A flat run would get an axis of less than a decade, on which no tick has a number.
    drawn = [value for value in chain(mean, *by_level.values(), [threshold]) if value > 0]
    edge = 0.02 * report.steps
    axes.set(ylim=(min(drawn) / 2.5, max(drawn) * 2.5), yscale="log", ylabel="variance of attention maps")
    axes.set(xlim=(-edge, max(report.steps - 1, 1) + edge), xlabel="denoising steps done")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    legend_beside(axes, handles=lines)
    return picture_of(figure)


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
    # Such as "down", "1.0" and "level 2" below each other, which fits under the bars.
    short = [
        f"{name.partition('_block')[0]}\n{'.'.join(filter(str.isdigit, name.split('.')))}\nlevel {report.levels[name]}"
        for name in names
    ]
    by_block.set_xticks(range(len(names)), short, fontsize=8)
    headed(by_block, "error of what a block adds, relative to it; 1 is as if it added nothing")
    headed(over_steps, "image moved by all errors so far, relative to it")
    over_steps.set(xlabel="denoising steps done; dashed: were errors independent", yscale="log")
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(frameon=False, loc="outside lower left", labelcolor=INK_HEX, fontsize=9, ncols=2)
    return picture_of(figure)


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
        headed(plot, f"level {level}")
        plot.set(xlabel="denoising step", ylim=(0, 1))
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plots[0].set_ylabel("an object's token ranks higher, share")
    legend_beside(plots[-1])
    return picture_of(figure)
