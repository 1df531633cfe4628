"""Charts of arithmetic: what each stage of a U-Net takes, and how cost grows with the image."""

from __future__ import annotations

from pathlib import Path

from matplotlib.patches import Patch
from PIL import Image

from atedm.costs.report import CostReport
from atedm.lab.charts.figure import FAINT_HEX, INK_HEX, new_chart, picture_of

ATTENTION, RESNET, OTHER = "#3b6fb6", "#d98b3a", "#b9bcc4"
"""Colours of the parts."""


def stage_chart(report: CostReport) -> Image.Image:
    """Draw dense and pruned steps as bars, stage by stage (supplement Fig. 1), exact and with overheads of pruning."""
    figures = report.figures()
    title = (
        f"{Path(report.model).name}, {report.size[0]} x {report.size[1]} px: {figures.dense / 1e12:.3g} T dense, "
        f"{figures.normal_step / 1e12:.3g} T in a normal pruned step ({figures.saving_normal:.1%} less)"
    )
    figure, axes = new_chart(9.5, 4.8, title)
    # The first and last convolution and the embeddings would be a bar too low to see.
    stages = [stage for stage in report.stages if stage.resnet + stage.other > 1e-3 * report.rest]
    for index, stage in enumerate(stages):
        blocks = report.spans_of(stage.name)
        bars = {"dense": ("dense", -0.19, 1.0), "pruned": ("normal_step", 0.19, 0.55)}
        for label, (step, offset, alpha) in bars.items():
            if not blocks and label == "pruned":
                continue
            x = index + offset if blocks else float(index)
            bottom = 0.0
            attention = sum(getattr(block, step).exact for block in blocks)
            for value, colour in ((stage.resnet, RESNET), (stage.other, OTHER), (attention, ATTENTION)):
                axes.bar(x, value / 1e12, 0.36, bottom=bottom, color=colour, alpha=alpha)
                bottom += value / 1e12
            if blocks:
                axes.text(x, bottom, label, ha="center", va="bottom", fontsize=7.5, color=FAINT_HEX)
    axes.set_xticks(range(len(stages)), [stage.name.replace("_blocks.", " ").replace("_block", "") for stage in stages])
    axes.set_ylabel("T MACs of a step", color=INK_HEX)
    parts = {"attention blocks": ATTENTION, "ResNet blocks": RESNET, "other": OTHER}
    handles = [Patch(color=colour, label=label) for label, colour in parts.items()]
    axes.legend(handles=handles, frameon=False, fontsize=9)
    return picture_of(figure)
