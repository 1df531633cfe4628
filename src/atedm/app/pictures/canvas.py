"""A plain sheet: cells of pictures with a caption above each, drawn with Pillow."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (30, 30, 34)
FAINT = (120, 122, 128)
_LINE = 560
"""Pixels that a sheet grows to for the sake of a line above it."""
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Cell(NamedTuple):
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
    """Lay rows of cells out on white, each picture ``side`` pixels on its longer side and ``gap`` apart.

    Rows may differ in length. The headline and the line above each row are cut where the sheet ends.
    """
    small, large = ImageFont.load_default(14), ImageFont.load_default(17)
    rows = [[Cell(_fit(cell.picture, side), _drawable(cell.title)) for cell in row] for row in rows]
    cells = [cell for row in rows for cell in row]
    columns = max(len(row) for row in rows)
    words = max(small.getlength(line) for cell in cells for line in cell.title.split("\n"))
    column_width = max(*(cell.picture.width for cell in cells), min(round(words), side))
    headline, *row_titles = (_drawable(" ".join(line.split())) for line in (headline, *row_titles))
    longest = max(large.getlength(line) for line in (headline, *row_titles))
    width = max(gap + columns * (column_width + gap), min(round(longest) + 2 * gap, _LINE))
    top = 34 if headline else gap
    title_height = 26 if any(row_titles) else 0
    label_height = 18 * max(cell.title.count("\n") + bool(cell.title) for cell in cells)
    heights = [max(cell.picture.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (width, top + sum(title_height + label_height + h + gap for h in heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 9), _cut(headline, large, width - 2 * gap), INK, large)
    y = top
    for row, height, line in zip(rows, heights, [*row_titles, *([""] * len(rows))], strict=False):
        draw.text((gap, y + 5), _cut(line, large, width - 2 * gap), INK, large)
        y += title_height
        for column, cell in enumerate(row):
            x = gap + column * (column_width + gap)
            draw.multiline_text((x, y), cell.title, FAINT, small, spacing=3)
            sheet.paste(cell.picture, (x, y + label_height))
        y += label_height + height + gap
    return sheet


def _drawable(text: str) -> str:
    """Write out the sign of AT-EDM†, which Pillow's own font does not have."""
    return text.replace("†", " dagger")


def _cut(line: str, font: _Font, width: int) -> str:
    """Cut a line that is wider than so many pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Scale to ``side`` on the longer side; small pictures keep hard pixel edges when they grow by a whole factor."""
    factor = side / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    if size == picture.size:
        return picture.convert("RGB")
    resample = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, resample)
