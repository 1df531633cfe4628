"""Charts of quality: figures against cost, a row a method, or FID against CLIP score."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image

from atedm.lab.evaluation.experiments import Experiment
from atedm.lab.evaluation.run import Outcome
from atedm.lab.evaluation.scoring import ACCURACY, CLIP, COLUMNS, DISTANCE, FID
from atedm.lab.plotting.figure import FAINT_HEX, marks, new_charts, picture_of, rows_named
from atedm.lab.scores.intervals import Interval

SHOWN = (DISTANCE, ACCURACY, CLIP)
"""Figures that charts show, where they were taken. The distance comes first: it tells good methods apart."""


def experiment_chart(experiment: Experiment, outcomes: Sequence[Outcome]) -> Image.Image | None:
    """Draw an experiment: FID against CLIP score where guidance varies, else quality against cost, or a row a method.

    None is drawn if no figure was taken that it shows.
    """
    found = [(outcome, result, result.scores.intervals()) for outcome in outcomes for result in outcome.results]
    if experiment.guidance:
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for outcome, result, figures in found:
            if CLIP in figures and FID in figures:
                point = (outcome.drawing.guidance, figures[CLIP].mean, figures[FID].mean)
                curves.setdefault(result.name, []).append(point)
        return curve_chart(curves, experiment.title) if curves else None
    shown = [name for name in SHOWN if any(name in figures for _, _, figures in found)]
    if not shown:
        return None
    if experiment.against_cost:
        points = {r.name: (r.candidate.kind, r.cost, got[shown[0]]) for _, r, got in found if shown[0] in got}
        return cost_chart(points, shown[0], experiment.title)
    rows = {}
    for outcome, result, figures in found:
        setting = "".join(f"{value:g} {what}, " for what, value in outcome.setting.items())
        rows[f"{setting}{result.name}, cost {result.cost:.2f}"] = {name: figures.get(name) for name in shown}
    return rows_chart(rows, experiment.title)


def cost_chart(points: Mapping[str, tuple[str, float, Interval]], metric: str, title: str = "") -> Image.Image:
    """Draw a figure with its interval against cost, a point a method.

    ``points`` holds (kind, cost, figure) by method; those of one kind are joined by a line. ``metric`` is of `SHOWN`.
    """
    what, factor, _ = COLUMNS[metric]
    figure, (axes,) = new_charts(8.5, 5.0, title=title)
    for kind, style in marks(list(dict.fromkeys(kind for kind, _, _ in points.values()))).items():
        here = sorted((cost, *value) for other, cost, value in points.values() if other == kind)
        costs, *figures = np.array(here).T
        mean, low, high = factor * np.array(figures)
        axes.errorbar(costs, mean, [mean - low, high - mean], ls="-", ms=6, lw=1.2, capsize=3, label=kind, **style)
    axes.set(xlabel="cost of a run, share of dense", ylabel=what)
    # Beside the plot, because methods of one cost lie on top of each other.
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    axes.margins(0.12)
    axes.grid(color=FAINT_HEX, alpha=0.15)
    return picture_of(figure)


def rows_chart(rows: Mapping[str, Mapping[str, Interval | None]], title: str = "") -> Image.Image:
    """Draw a row a method and a panel a figure, each with its interval: for methods whose cost is much the same.

    ``rows`` holds figures by method and metric, one of `SHOWN`; a method may lack some.
    """
    metrics = list(dict.fromkeys(metric for figures in rows.values() for metric in figures))
    figure, plots = new_charts(3.2 + 3.0 * len(metrics), 1.3 + 0.3 * len(rows), len(metrics), title, sharey=True)
    for axes, metric in zip(plots, metrics, strict=True):
        what, factor, _ = COLUMNS[metric]
        for row, figures in enumerate(rows.values()):
            if value := figures.get(metric):
                mean, low, high = (factor * end for end in value)
                ends = [[mean - low], [high - mean]]
                axes.errorbar([mean], [row], xerr=ends, fmt="o", ms=5, capsize=3, color=colormaps["viridis"](0.35))
        rows_named(axes, list(rows))
        axes.set_xlabel(what)
        axes.grid(color=FAINT_HEX, alpha=0.15)
    return picture_of(figure)


def curve_chart(curves: Mapping[str, Sequence[tuple[float, float, float]]], title: str = "") -> Image.Image:
    """Draw FID against CLIP score over guidance scales, a line a method (supplement Fig. 5).

    ``curves`` holds (guidance, CLIP score, FID) by method. FID is drawn by its logarithm, beside it the good end once
    more: the third of all points with the best FID.
    """
    points = sorted((point for curve in curves.values() for point in curve), key=lambda point: point[2])
    good = points[: max(2, len(points) // 3)]
    figure, panels = new_charts(11.0, 5.0, 2, title)
    for place, set_limits in ((1, panels[1].set_xlim), (2, panels[1].set_ylim)):
        low, high = min(point[place] for point in good), max(point[place] for point in good)
        edge = 0.08 * (high - low) or 0.01 * high
        set_limits(low - edge, high + edge)
    panels[1].set_title("the good end, enlarged", loc="left", fontsize=9, color=FAINT_HEX)
    for panel in panels:
        for (name, curve), style in zip(curves.items(), marks(list(curves)).values(), strict=True):
            panel.plot([p[1] for p in curve], [p[2] for p in curve], ls="-", ms=4, lw=1.2, label=name, **style)
        for guidance, clip, fid in next(iter(curves.values())):
            panel.annotate(f"{guidance:g}", (clip, fid), fontsize=7, color=FAINT_HEX, annotation_clip=True)
        panel.set_xlabel("CLIP score")
    panels[0].set(ylabel="FID", yscale="log")
    panels[0].legend(frameon=False, fontsize=9)
    return picture_of(figure)
