"""Results to read: a table in Markdown, a sheet of images, and one HTML page with both."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from atedm.evaluation.evaluate import Result, image_of
from atedm.evaluation.prompts import Prompt
from atedm.evaluation.statistics import Interval
from atedm.files import save_text
from atedm.pictures.canvas import Cell, draw_sheet

COLUMNS = {
    "psnr": ("distance to dense, dB", 1.0, 1),
    "lpips": ("LPIPS to dense", 1.0, 4),
    "accuracy": ("captions right in everything, %", 100.0, 1),
    "clip": ("CLIP score", 1.0, 4),
    "fid": ("FID", 1.0, 2),
}
"""Title, factor and digits of each figure."""


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table with 95 % intervals; figures that nobody has are left out."""
    all_figures = [result.scores.intervals() for result in results]
    shown = [name for name in COLUMNS if any(name in figures for figures in all_figures)]
    rows = []
    for result, figures in zip(results, all_figures, strict=True):
        cells = [_cell(name, figures.get(name)) for name in shown]
        rows.append([result.name, f"{result.cost:.3f}", *cells])
    return ["method", "cost", *(COLUMNS[name][0] for name in shown)], rows


def _cell(name: str, interval: Interval | None) -> str:
    _, factor, digits = COLUMNS[name]
    return "" if interval is None else interval.text(factor, digits)


def markdown(results: Sequence[Result]) -> str:
    """Show the table in Markdown."""
    head, rows = table(results)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def image_sheet(results: Sequence[Result], prompts: Sequence[Prompt], count: int = 6, side: int = 160) -> Image.Image:
    """Lay out the first images of every method, a prompt a row."""
    return _sheet([(prompt.text, results, index) for index, prompt in enumerate(prompts[:count])], side)


def settings_sheet(
    settings: Mapping[str, Sequence[Result]], prompts: Sequence[Prompt], count: int = 6, side: int = 160
) -> Image.Image:
    """Lay out the first images of every method under several settings: at least one row a setting, a prompt a row.

    Args:
        settings: Results by what the setting is called, as "guidance 7".
        prompts: What was drawn.
        count: Rows, where that is more than there are settings.
        side: Longer side of a picture, in pixels.
    """
    each = max(1, count // len(settings))
    rows = [
        (f"{title}: {prompt.text}", results, index)
        for title, results in settings.items()
        for index, prompt in enumerate(prompts[:each])
    ]
    return _sheet(rows, side)


def _sheet(rows: Sequence[tuple[str, Sequence[Result], int]], side: int) -> Image.Image:
    """Draw rows of (title, results, number of the image), methods named above the first and where they change."""
    cells: list[list[Cell]] = []
    above: list[str] = []
    for _, results, index in rows:
        names = [result.name for result in results]
        row = []
        for result in results:
            with Image.open(image_of(result, index)) as opened:
                row.append(Cell(opened.convert("RGB"), "" if names == above else _short(result.name)))
        cells.append(row)
        above = names
    return draw_sheet(cells, [title for title, _, _ in rows], side=side)


def _short(name: str, width: int = 20) -> str:
    """Break a name into at most three lines that fit over a picture."""
    lines, line = [], ""
    for part in name.replace("[", " [").replace(",", ", ").split():
        if line and len(line) + len(part) >= width:
            lines.append(line)
            line = ""
        line = f"{line} {part}".strip()
    return "\n".join([*lines, line][:3])


def write_html(results: Sequence[Result], prompts: Sequence[Prompt], title: str, note: str, file: Path) -> None:
    """Write one page that needs nothing else: the table and the sheet.

    Args:
        results: In the order they are shown.
        prompts: What was drawn.
        title: Headline.
        note: A line below it: model, steps, how many images.
        file: Where to; written whole or not at all.
    """
    head, rows = table(results)
    picture = io.BytesIO()
    image_sheet(results, prompts).save(picture, format="PNG", optimize=True)
    encoded = base64.b64encode(picture.getvalue()).decode()
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    page = _PAGE.format(title=html.escape(title), note=html.escape(note), head=cells, body=body, picture=encoded)
    save_text(page, file)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1e1e22; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #ddd; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; font-family: ui-monospace, monospace; font-size: .9em; }}
div {{ overflow-x: auto; }}
img {{ max-width: 100%; margin-top: 1.5rem; }}
p {{ color: #65676d; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>Intervals are 95 %, by bootstrap over images. Cost is the share of the dense run's multiply-accumulates of the U-Net,
counted by torch, everything that a method adds included.</p>
<img alt="The first images of every method, a prompt a row" src="data:image/png;base64,{picture}">
</body>
</html>
"""
