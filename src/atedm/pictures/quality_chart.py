"""Charts of quality: what each method costs against what is left of the picture, and FID against CLIP score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from PIL import Image

from atedm.evaluation.statistics import Interval
from atedm.pictures.figure import FAINT_HEX, INK_HEX, new_chart, open_chart, picture_of


def cost_chart(
    figures: Mapping[str, tuple[float, Interval]],
    what: str,
    factor: float = 1.0,
    title: str = "",
    kinds: Mapping[str, str] | None = None,
) -> Image.Image:
    """Draw a figure with its interval against cost, a point a method.

    Args:
        figures: (share of the dense cost, figure) by method.
        what: Name of the figure.
        factor: What it is multiplied by, 100 for a share in percent.
        title: Headline.
        kinds: Of each method; those of one kind are joined by a line, because they differ in their cost alone. None
            makes every method a kind of its own.
    """
    figure, axes = new_chart(8.5, 5.0)
    of_kind: dict[str, list[str]] = {}
    for name in sorted(figures, key=lambda name: figures[name][0]):
        of_kind.setdefault(name if kinds is None else kinds[name], []).append(name)
    in_order = [name for name in figures if name in of_kind] if kinds is None else list(of_kind)
    marks = _marks(in_order)
    for kind in in_order:
        names = of_kind[kind]
        costs = [figures[name][0] for name in names]
        means, lows, highs = ([factor * figures[name][1][end] for name in names] for end in range(3))
        ends = [[m - low for m, low in zip(means, lows, strict=True)]]
        ends.append([high - m for m, high in zip(means, highs, strict=True)])
        axes.errorbar(costs, means, ends, ls="-", ms=6, lw=1.2, capsize=3, label=kind, **marks[kind])
    axes.set_xlabel("cost of a run, share of dense", color=INK_HEX)
    axes.set_ylabel(what, color=INK_HEX)
    axes.set_title(title, loc="left", fontsize=11, color=INK_HEX)
    # Beside the plot, because methods of one cost lie on top of each other.
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    axes.margins(0.12)
    axes.grid(color=FAINT_HEX, alpha=0.15)
    return picture_of(figure)


def rows_chart(rows: Mapping[str, Mapping[str, tuple[Interval, float]]], title: str = "") -> Image.Image:
    """Draw a row a method and a panel a figure, each with its interval: for methods whose cost is much the same.

    Args:
        rows: By method and name of the figure: the figure, and what it is multiplied by. A method may lack some.
        title: Headline.
    """
    panels = list(dict.fromkeys(what for figures in rows.values() for what in figures))
    figure, _ = new_chart(3.2 + 3.0 * len(panels), 1.3 + 0.3 * len(rows))
    figure.clear()
    colour = colormaps["viridis"](0.35)
    for place, (axes, what) in enumerate(
        zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True)
    ):
        for row, figures in enumerate(rows.values()):
            if what in figures:
                mean, low, high = (figures[what][1] * end for end in figures[what][0])
                axes.errorbar([mean], [row], xerr=[[mean - low], [high - mean]], fmt="o", ms=5, capsize=3, color=colour)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(what, color=INK_HEX)
        axes.tick_params(colors=INK_HEX, width=0.6)
        axes.tick_params(axis="y", length=0, labelleft=place == 0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT_HEX)
        axes.grid(color=FAINT_HEX, alpha=0.15)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK_HEX)
    return picture_of(figure)


def curve_chart(curves: Mapping[str, Sequence[tuple[float, float, float]]], title: str = "") -> Image.Image:
    """Draw FID against CLIP score over guidance scales, a line a method (supplement Fig. 5).

    Where some scales or methods are far off, FID is drawn by its logarithm and the good end once more, enlarged.

    Args:
        curves: (guidance, CLIP score, FID) by method.
        title: Headline.
    """
    points = [point for curve in curves.values() for point in curve]
    best_clip, best_fid = max(point[1] for point in points), min(point[2] for point in points)
    near = [point for point in points if point[1] >= 0.97 * best_clip and point[2] <= 6 * best_fid]
    is_spread = len(near) > len(curves) and min(point[1] for point in points) < 0.8 * best_clip
    figure, axes = new_chart(11.0 if is_spread else 8.5, 5.0)
    panels = [axes]
    if is_spread:
        figure.clear()
        panels = list(figure.subplots(1, 2))
        panels[0].set_yscale("log")
        for place, name in ((1, "set_xlim"), (2, "set_ylim")):
            low, high = min(point[place] for point in near), max(point[place] for point in near)
            edge = 0.08 * (high - low)
            getattr(panels[1], name)(low - edge, high + edge)
        panels[1].set_title("the good end, enlarged", loc="left", fontsize=9, color=FAINT_HEX)
    marks = _marks(list(curves))
    for panel in panels:
        for name, curve in curves.items():
            panel.plot([p[1] for p in curve], [p[2] for p in curve], ls="-", ms=4, lw=1.2, label=name, **marks[name])
        # One line of numbers is enough, where the lines are near each other.
        for point in next(iter(curves.values())):
            if not is_spread or (point in near) == (panel is panels[-1]):
                panel.annotate(
                    f"{point[0]:g}", point[1:], (4, 4), textcoords="offset points", fontsize=7, color=FAINT_HEX
                )
        open_chart(panel)
        panel.set_xlabel("CLIP score", color=INK_HEX)
    panels[0].set_ylabel("FID", color=INK_HEX)
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK_HEX)
    return picture_of(figure)


def _marks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ten colours, then the same with another marker, so that no two are alike."""
    palette, markers = colormaps["tab10"], "os^DvP"
    return {
        name: {"color": palette(index % 10), "marker": markers[index // 10 % len(markers)]}
        for index, name in enumerate(names)
    }
