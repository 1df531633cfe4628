"""A plain sheet: cells of pictures with a caption above each, drawn with Pillow."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (30, 30, 34)
FAINT = (120, 122, 128)


@dataclass(frozen=True)
class Cell:
    """One picture with a line or two above it."""

    picture: Image.Image
    title: str = ""


def draw_sheet(
    rows: Sequence[Sequence[Cell]],
    row_titles: Sequence[str] = (),
    *,
    headline: str = "",
    side: int = 256,
    gap: int = 10,
) -> Image.Image:
    """Lay rows of cells out on white, each picture ``side`` pixels on its longer side.

    Args:
        rows: The cells; rows may differ in length.
        row_titles: A line above each row.
        headline: A line on top.
        side: Longer side of a picture, in pixels.
        gap: Space between pictures, in pixels.
    """
    small, large = ImageFont.load_default(14), ImageFont.load_default(17)
    columns = max(len(row) for row in rows)
    column_width = max(_fit(cell.picture, side).width for row in rows for cell in row)
    width = gap + columns * (column_width + gap)
    top = 34 if headline else gap
    title_height = 26 if any(row_titles) else 0
    label_height = 18 * max((cell.title.count("\n") + bool(cell.title) for row in rows for cell in row), default=0)
    heights = [max(_fit(cell.picture, side).height for cell in row) for row in rows]
    sheet = Image.new("RGB", (width, top + sum(title_height + label_height + h + gap for h in heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if headline:
        draw.text((gap, 9), headline, INK, large)
    y = top
    for index, row in enumerate(rows):
        if title_height:
            line = row_titles[index] if index < len(row_titles) else ""
            draw.text((gap, y + 5), textwrap.shorten(line, max(20, width // 8), placeholder="..."), INK, large)
        y += title_height
        for column, cell in enumerate(row):
            x = gap + column * (column_width + gap)
            draw.multiline_text((x, y), cell.title, FAINT, small, spacing=3)
            sheet.paste(_fit(cell.picture, side), (x, y + label_height))
        y += label_height + heights[index] + gap
    return sheet


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Scale to ``side`` on the longer side; small pictures keep hard pixel edges when they grow by a whole factor."""
    factor = side / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    if size == picture.size:
        return picture.convert("RGB")
    resample = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, resample)
