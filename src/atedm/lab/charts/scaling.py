"""How cost grows with the image (supplement Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from atedm.lab.charts.cost import ATTENTION, RESNET
from atedm.lab.charts.figure import INK_HEX, new_charts, picture_of
from atedm.lab.probes.scaling import Point


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
        axes.set_title(f"{Path(model).name}: {shares}", loc="left", fontsize=9, color=INK_HEX)
        axes.set_xticks([side for side in sides if side % 512 == 0] or sides)
        axes.set_xlabel("side of the image, px", color=INK_HEX)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    plots[0].set_ylabel("T MACs of a step", color=INK_HEX)
    return picture_of(figure)
