"""Results to read: tables, a chart, a sheet of images, and one HTML page with all of them."""

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageOps

import atedm
from atedm.app.pictures.canvas import Cell, draw_sheet
from atedm.files import save_image, save_json, save_text
from atedm.lab.evaluation.charts import experiment_chart
from atedm.lab.evaluation.experiments import Experiment
from atedm.lab.evaluation.images import image_file
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.evaluation.run import Outcome, Result
from atedm.lab.evaluation.scoring import ALL, COLUMNS, Metrics
from atedm.lab.tables import markdown_table

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""
ALT = "The first images of every method, a prompt a row"
FOOT = (
    "Intervals are 95 %, by bootstrap over images. Cost is the share of the dense run's multiply-accumulates of the "
    "model, counted by torch, everything that a method adds included."
)


def tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """Return cost and figures of every method, with 95 % intervals; where it was judged, also what is right of what."""
    setting = [*outcomes[0].setting]
    quality: list[list[str]] = []
    right: list[list[str]] = []
    found = [(outcome, result) for outcome in outcomes for result in outcome.results]
    figures = [result.scores.intervals() for _, result in found]
    shares = [result.scores.attributes() for _, result in found]
    shown = [what for what in COLUMNS if any(what in own for own in figures)]
    asked = list(dict.fromkeys(what for own in shares for what in own))
    for (outcome, result), own, share in zip(found, figures, shares, strict=True):
        name = [*(f"{value:g}" for value in outcome.setting.values()), result.name]
        cells = (own[what].text(*COLUMNS[what][1:]) if what in own else "" for what in shown)
        quality.append([*name, f"{result.cost:.3f}", *cells])
        right.append([*name, *(f"{100 * share[what].mean:.1f}" if what in share else "" for what in asked)])
    both = [([*setting, "method", "cost", *(COLUMNS[what][0] for what in shown)], quality)]
    return both + [([*setting, "right, %", *asked], right)] * bool(asked)


def markdown_of(outcomes: Sequence[Outcome]) -> str:
    """Show the tables in Markdown, and what was left out and why."""
    reasons = sorted({f"- {label}: {reason}" for outcome in outcomes for label, reason in outcome.left_out.items()})
    parts = [*(markdown_table(*table) for table in tables(outcomes)), "\n".join(reasons)]
    return "\n\n".join(filter(None, parts))


def sheet_of(outcomes: Sequence[Outcome], prompts: Sequence[Prompt], count: int = 6, side: int = 160) -> Image.Image:
    """Lay out the first images of every method, a prompt a row; a red frame marks what the judge finds wrong.

    Settings stand below each other, each with at least one of the ``count`` rows; ``side`` is the longer side of a
    picture in pixels.
    """
    rows: list[list[Cell]] = []
    titles: list[str] = []
    above: list[str] = []
    for outcome in outcomes:
        setting = "".join(f"{what} {value:g}: " for what, value in outcome.setting.items())
        names = [result.name for result in outcome.results]
        for index, prompt in enumerate(prompts[: max(1, count // len(outcomes))]):
            # Methods are named above the first row, and where they change.
            rows.append([_cell(result, index, "" if names == above else result.name) for result in outcome.results])
            titles.append(setting + prompt.text)
            above = names
    return draw_sheet(rows, titles, side=side)


def _cell(result: Result, index: int, title: str) -> Cell:
    with Image.open(image_file(result.folder, index)) as opened:
        picture = opened.convert("RGB")
    if result.scores.accuracy and not result.scores.accuracy[ALL][0][index]:
        border = max(2, min(picture.size) // 32)
        picture = ImageOps.expand(ImageOps.crop(picture, border), border, (220, 30, 30))
    return Cell(picture, "\n".join(textwrap.wrap(title.replace("[", " [").replace(",", ", "), 20)[:3]))


def write_report(
    experiment: Experiment,
    outcomes: Sequence[Outcome],
    prompts: Sequence[Prompt],
    metrics: Metrics,
    out: Path,
    name: str,
    rows: int = 6,
) -> str:
    """Write NAME.json, NAME.md, NAME.html, NAME.png (a chart) and NAME-sheet.png, each whole or not at all.

    ``outcomes`` come from `run_experiment`; ``rows`` is how many rows of images the sheet shows. Returns what NAME.md
    holds, or raises an `OSError` if a file cannot be written.
    """
    title = f"{experiment.title} ({experiment.source})" if experiment.source else experiment.title
    drawing = outcomes[0].drawing
    note = f"{drawing.model}, {len(prompts)} prompts, {drawing.steps} steps, guidance {drawing.guidance:g}"
    text = f"## {title}\n\n{markdown_of(outcomes)}\n"
    content = {
        "versions": {"atedm": atedm.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "title": title,
        "images": len(prompts),
        "metrics": asdict(metrics),
        "outcomes": [outcome.as_dict() for outcome in outcomes],
    }
    save_json(content, out / f"{name}.json")
    save_text(text, out / f"{name}.md")
    (out / f"{name}.png").unlink(missing_ok=True)  # it may be of other metrics than these figures
    if chart := experiment_chart(experiment, outcomes):
        save_image(chart, out / f"{name}.png")
    sheet = sheet_of(outcomes, prompts, rows)
    save_image(sheet, out / f"{name}-sheet.png")
    save_text(page_of(tables(outcomes), title, note, [sheet]), out / f"{name}.html")
    return text


def page_of(found: Sequence[Table], title: str, note: str, pictures: Sequence[Image.Image], foot: str = FOOT) -> str:
    """Return one page that needs nothing else: tables, what is said below them, and pictures."""
    tables, images = "", []
    for head, rows in found:
        lines = [(cell, "th") for cell in head], *([(cell, "td") for cell in row] for row in rows)
        cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell, tag in line) for line in lines)
        tables += "<div><table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table></div>"
    for picture in pictures:
        png = io.BytesIO()
        picture.save(png, format="PNG", optimize=True)
        data = base64.b64encode(png.getvalue()).decode()
        images.append(f'<img alt="{ALT}" src="data:image/png;base64,{data}">')
    title, note, foot = map(html.escape, (title, note, foot))
    return _PAGE.format(title=title, note=note, tables=tables, foot=foot, pictures="\n".join(images))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1e1e22; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1.5rem; }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #ddd; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; font-family: ui-monospace, monospace; font-size: .9em; }}
div {{ overflow-x: auto; }}
img {{ max-width: 100%; }}
p {{ color: #65676d; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
{tables}
<p>{foot}</p>
{pictures}
</body>
</html>
"""
