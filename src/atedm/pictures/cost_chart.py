"""Charts of arithmetic: what each stage of a U-Net takes, and how cost grows with the image."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from PIL import Image

from atedm.choices import own_name
from atedm.costs.report import CostReport
from atedm.costs.scaling import Point
from atedm.pictures.figure import FAINT_HEX, INK_HEX, new_chart, picture_of

ATTENTION, RESNET, OTHER = "#3b6fb6", "#d98b3a", "#b9bcc4"
"""Colours of the parts."""


def stage_chart(report: CostReport) -> Image.Image:
    """Draw dense and pruned steps as bars, stage by stage (supplement Fig. 1).

    Args:
        report: From `atedm.cost`. The exact convention is drawn, overheads of pruning included.
    """
    figure, axes = new_chart(9.5, 4.8)
    # The first and last convolution and the embeddings would be a bar too low to see.
    stages = [stage for stage in report.stages if stage.resnet + stage.other > 1e-3 * report.rest]
    bar = 0.38
    for index, stage in enumerate(stages):
        blocks = [block for block in report.blocks if block.shape.place.name.startswith(f"{stage.name}.")]
        for offset, step in ((-bar / 2, "dense"), (bar / 2, "normal_step")):
            attention = sum(getattr(block, step).exact for block in blocks)
            if step == "normal_step" and not blocks:
                continue
            x = index + offset if blocks else float(index)
            bottom = 0.0
            pale = 1.0 if step == "dense" else 0.55
            for value, colour in ((stage.resnet, RESNET), (stage.other, OTHER), (attention, ATTENTION)):
                axes.bar(x, value / 1e12, bar * 0.94, bottom=bottom, color=colour, alpha=pale)
                bottom += value / 1e12
            if blocks:
                label = "dense" if step == "dense" else "pruned"
                axes.annotate(
                    label, (x, bottom), (0, 3), textcoords="offset points", ha="center", fontsize=7.5, color=FAINT_HEX
                )
    axes.set_xticks(range(len(stages)), [stage.name.replace("_blocks.", " ").replace("_block", "") for stage in stages])
    axes.set_ylabel("T MACs of a step", color=INK_HEX)
    _legend(axes, (("attention blocks", ATTENTION), ("ResNet blocks", RESNET), ("other", OTHER)))
    figures = report.figures()
    width, height = report.size
    axes.set_title(
        f"{own_name(report.model)}, {width} x {height} px: {figures.dense / 1e12:.3g} T dense, "
        f"{figures.normal_step / 1e12:.3g} T in a normal pruned step ({figures.saving_normal:.1%} less)",
        loc="left",
        fontsize=11,
        color=INK_HEX,
    )
    return picture_of(figure)


def scaling_chart(points: Sequence[Point]) -> Image.Image:
    """Draw the cost of attention and ResNet blocks against the size of the image (supplement Fig. 2).

    Args:
        points: From `atedm.costs.scaling.scaling`.
    """
    models = list(dict.fromkeys(point.model for point in points))
    figure, _ = new_chart(4.2 * len(models), 4.2)
    figure.clear()
    all_axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(all_axes, models, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        of_model = [point for point in points if point.model == model]
        sides = [point.side for point in of_model]
        axes.plot(sides, [p.attention for p in of_model], color=ATTENTION, marker="o", ms=4, label="attention blocks")
        kept = [(p.side, p.attention_pruned) for p in of_model if p.attention_pruned is not None]
        if kept:
            axes.plot(*zip(*kept, strict=True), color=ATTENTION, ls="--", marker="o", ms=3, label="the same, pruned")
        axes.plot(sides, [p.resnet for p in of_model], color=RESNET, marker="s", ms=4, label="ResNet blocks")
        axes.set_title(own_name(model), loc="left", fontsize=11, color=INK_HEX)
        axes.set_xticks([side for side in sides if side % 512 == 0] or sides)
        axes.set_xlabel("side of the image, px", color=INK_HEX)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
        for point in dict.fromkeys((of_model[0], of_model[-1])):
            axes.annotate(
                f"{point.attention_share:.0%} of the step",
                (point.side, point.attention),
                (-2, 18) if point is of_model[0] else (-7, 0),
                textcoords="offset points",
                ha="left" if point is of_model[0] else "right",
                fontsize=8,
                color=ATTENTION,
            )
    all_axes[0].set_ylabel("T MACs of a step", color=INK_HEX)
    return picture_of(figure)


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    axes.legend(handles=[Patch(color=colour, label=label) for label, colour in entries], frameon=False, fontsize=9)
