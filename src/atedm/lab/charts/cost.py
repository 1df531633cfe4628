"""Charts of arithmetic: what each stage of a U-Net takes, and how cost grows with the image."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.patches import Patch
from PIL import Image

from atedm.costs.report import CostReport
from atedm.lab.plotting.figure import FAINT_HEX, headed, new_charts, picture_of
from atedm.lab.probes.scaling import Point

ATTENTION, RESNET, OTHER = "#3b6fb6", "#d98b3a", "#b9bcc4"
"""Colours of the parts."""


def stage_chart(report: CostReport) -> Image.Image:
    """Draw dense and pruned steps as bars, stage by stage (supplement Fig. 1), exact and with overheads of pruning."""
    figures = report.figures()
    title = (
        f"{Path(report.model).name}, {report.size[0]} x {report.size[1]} px: {figures.dense / 1e12:.3g} T dense, "
        f"{figures.normal_step / 1e12:.3g} T in a normal pruned step ({figures.saving_normal:.1%} less)"
    )
    figure, (axes,) = new_charts(9.5, 4.8, title=title)
    # The first and last convolution and the embeddings would be a bar too low to see.
    stages = [stage for stage in report.stages if stage.resnet + stage.other > 1e-3 * report.rest]
    for index, stage in enumerate(stages):
        blocks = report.spans_of(stage.name)
        bars = (("dense", "dense", index - 0.19, 1.0), ("pruned", "normal_step", index + 0.19, 0.55))
        for label, step, x, alpha in bars if blocks else [("", "dense", index, 1.0)]:
            bottom = 0.0
            attention = sum(getattr(block, step).exact for block in blocks)
            for value, colour in ((stage.resnet, RESNET), (stage.other, OTHER), (attention, ATTENTION)):
                axes.bar(x, value / 1e12, 0.36, bottom=bottom, color=colour, alpha=alpha)
                bottom += value / 1e12
            axes.text(x, bottom, label, ha="center", va="bottom", fontsize=7.5, color=FAINT_HEX)
    axes.set_xticks(range(len(stages)), [stage.name.replace("_blocks.", " ").replace("_block", "") for stage in stages])
    axes.set_ylabel("T MACs of a step")
    parts = {"attention blocks": ATTENTION, "ResNet blocks": RESNET, "other": OTHER}
    handles = [Patch(color=colour, label=label) for label, colour in parts.items()]
    axes.legend(handles=handles, frameon=False, fontsize=9)
    return picture_of(figure)


def scaling_chart(points: Sequence[Point]) -> Image.Image:
    """Draw the cost of attention and ResNet blocks against the size of the image (supplement Fig. 2)."""
    models = list(dict.fromkeys(point.model for point in points))
    figure, plots = new_charts(4.2 * len(models), 4.2, len(models))
    for axes, model in zip(plots, models, strict=True):
        here = [point for point in points if point.model == model]
        sides = [point.side for point in here]
        axes.plot(sides, [p.attention for p in here], color=ATTENTION, marker="o", ms=4, label="attention blocks")
        pruned = [(p.side, p.attention_pruned) for p in here if p.attention_pruned is not None]
        if pruned:
            axes.plot(*zip(*pruned, strict=True), color=ATTENTION, ls="--", marker="o", ms=3, label="the same, pruned")
        axes.plot(sides, [p.resnet for p in here], color=RESNET, marker="s", ms=4, label="ResNet blocks")
        shares = f"attention is {here[0].attention_share:.0%} to {here[-1].attention_share:.0%} of the step"
        headed(axes, f"{Path(model).name}: {shares}", 9)
        axes.set_xticks([side for side in sides if side % 512 == 0] or sides)
        axes.set_xlabel("side of the image, px")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    plots[0].set_ylabel("T MACs of a step")
    return picture_of(figure)
