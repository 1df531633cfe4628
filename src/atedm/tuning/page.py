"""The page beside a plan: what was tried, how near it came, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from atedm.app.pictures.canvas import Cell, draw_sheet
from atedm.files import save_text
from atedm.lab.evaluation.report import page_of
from atedm.lab.plotting.figure import new_charts, picture_of
from atedm.lab.scores.pixels import read_picture
from atedm.plans.plan import Plan
from atedm.tuning.drawing import Easel
from atedm.tuning.search import Tried

_ROWS = 30
"""Of the table."""


def write_page(file: Path, plan: Plan, tried: Sequence[Tried], easel: Easel) -> None:
    """Write one page that needs nothing else."""
    found = plan.found
    title = f"A plan at {found['budget']:g} of the dense {found['of']}"
    note = (
        f"{plan.model.get('name') or plan.model['pipeline']}: {plan.what()}. {found['distance']:.1f} dB from the dense "
        f"images of {found['dense_steps']} steps on {found['prompts']} prompts, {found['cost']:.1%} of the dense "
        "arithmetic"
        + (f", {found['time']:.1%} of the dense time measured whole" if "time" in found else "")
        + (f". LPIPS to dense {found['lpips']:.4f}" if "lpips" in found else "")
        + (
            f". CLIP score {found['clip_score']:.4f}, dense {found['dense_clip_score']:.4f}"
            if "clip_score" in found
            else ""
        )
        + f". The search took {found['images']:g} dense images."
    )
    head = ["plan", "what it does", "cost", "distance, dB", "prompts"]
    rows = [
        [one.name, one.plan.what(), f"{one.share:.3f}", f"{one.distance:.1f}", str(len(one.distances))]
        for one in tried[:_ROWS]
    ]
    foot = (
        f"Cost is by {found['of']}, a share of the dense run. Plans of few prompts were given up after those. "
        "All images of a prompt begin with the same noise."
    )
    save_text(page_of([(head, rows)], title, note, [_chart(tried, found["of"]), _sheet(tried, easel)], foot), file)


def _chart(tried: Sequence[Tried], of: str) -> Image.Image:
    """Draw distance against cost: all plans, and those that none is both cheaper and nearer than."""
    figure, (axes,) = new_charts(7, 4, title="Distance to dense against cost")
    for whole, colour, label in ((True, "tab:blue", "all prompts drawn"), (False, "tab:gray", "given up")):
        some = [one for one in tried if one.is_whole == whole]
        axes.scatter([one.share for one in some], [one.distance for one in some], s=18, color=colour, label=label)
    front = pareto([one for one in tried if one.is_whole])
    axes.plot([one.share for one in front], [one.distance for one in front], color="tab:blue", linewidth=1)
    axes.set_xlabel(f"cost, share of the dense {of}")
    axes.set_ylabel("distance, dB")
    axes.legend(frameon=False, fontsize=9)
    return picture_of(figure)


def pareto(tried: Sequence[Tried]) -> list[Tried]:
    """Return the plans that no other is both cheaper and nearer than, the cheapest first."""
    front: list[Tried] = []
    for one in sorted(tried, key=lambda one: (one.share, -one.distance)):
        if not front or one.distance > front[-1].distance:
            front.append(one)
    return front


def _sheet(tried: Sequence[Tried], easel: Easel, rows: int = 4, columns: int = 4) -> Image.Image:
    whole = [one for one in tried if one.is_whole][:columns]
    titles = {"dense": easel.dense, **{f"{one.name}\n{one.distance:.1f} dB": one.plan for one in whole}}
    rows = min(rows, len(easel.prompts))
    pictures = [map(read_picture, easel.files(plan, rows)) for plan in titles.values()]
    drawn = [
        [Cell(picture, "" if index else title) for title, picture in zip(titles, row, strict=True)]
        for index, row in enumerate(zip(*pictures, strict=True))
    ]
    return draw_sheet(drawn, easel.prompts[: len(drawn)], side=160)
