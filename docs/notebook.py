"""Make the notebook of the tutorial: `python docs/notebook.py` writes docs/tutorial.ipynb from docs/tutorial.md."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TUTORIAL = Path(__file__).parent / "tutorial.md"
NOTEBOOK = TUTORIAL.with_suffix(".ipynb")
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def notebook() -> nbformat.NotebookNode:
    """Return the tutorial, its Python and its commands as cells, numbered, so that it is always the same."""
    cells, end, text = [], 0, TUTORIAL.read_text()
    for block in FENCE.finditer(text):
        cells.append(new_markdown_cell(text[end : block.start()].strip()))
        code = block[2].strip()
        cells.append(new_code_cell(code if block[1] == "python" else re.sub(r"^", "!", code, flags=re.MULTILINE)))
        end = block.end()
    cells.append(new_markdown_cell(text[end:].strip()))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=about)


def main() -> None:
    """Write the notebook."""
    NOTEBOOK.write_text(nbformat.writes(notebook()) + "\n")


if __name__ == "__main__":
    main()
