"""A chart as a picture: matplotlib without its global state, in the colours of the sheets."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from atedm.pictures.canvas import FAINT, INK

INK_HEX, FAINT_HEX = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (INK, FAINT))


def new_chart(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of so many inches and its one plot, with as few lines as a reader needs."""
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    open_chart(axes)
    return figure, axes


def open_chart(axes: Axes) -> None:
    """Leave of a plot's frame what is read by: the axes at the left and below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_HEX)
    axes.tick_params(colors=INK_HEX, which="both", width=0.6)


def picture_of(figure: Figure) -> Image.Image:
    """Draw a figure, (height, width, 3) in 8 bits."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
