"""A chart as a picture: matplotlib without its global state, in the colours of the sheets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from atedm.app.pictures.canvas import FAINT, INK

INK_HEX, FAINT_HEX = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (INK, FAINT))


def new_charts(width: float, height: float, columns: int = 1, title: str = "", **options: Any) -> tuple[Figure, Any]:
    """Return a figure of so many inches, a title over it, and its plots side by side, with as few lines as are needed.

    Other options are those of `matplotlib.figure.Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    plots = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT_HEX)
        axes.tick_params(colors=INK_HEX, which="both", width=0.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(INK_HEX)
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK_HEX, fontsize=10, wrap=True)
    return figure, plots


def headed(axes: Axes, text: str, size: float = 10) -> None:
    """Put a heading over the left end of a plot."""
    axes.set_title(text, loc="left", color=INK_HEX, fontsize=size)


def rows_named(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a plot from the top down."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def legend_beside(axes: Axes, **options: Any) -> None:
    """Put the legend to the right of a plot."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelcolor=INK_HEX, fontsize=9, **options)


def marks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ten colours by name, then the same with another marker, so that no two are alike."""
    palette, markers = colormaps["tab10"], "os^DvP"
    return {
        name: {"color": palette(index % 10), "marker": markers[index // 10 % len(markers)]}
        for index, name in enumerate(names)
    }


def picture_of(figure: Figure) -> Image.Image:
    """Draw a figure, (height, width, 3) in 8 bits."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
