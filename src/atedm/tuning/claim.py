"""A folder is of one search or one training: what it is of is written down, and another is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atedm.files import read_json, save_json


def claim(file: Path, asked: Mapping[str, Any], what: str) -> None:
    """Write down what a folder is of, or see that it is of the same.

    Args:
        file: In the folder.
        asked: Plain JSON values.
        what: What the folder holds, for the error: "a search with".

    Raises:
        ValueError: If it holds another one; the message names the first thing that differs.
    """
    if not file.exists():
        save_json(dict(asked), file)
        return
    stored = read_json(file)
    if changed := [name for name in asked if stored.get(name) != asked[name]]:
        raise ValueError(f"{file.parent} holds {what} another {changed[0]}; give another --out, or remove it")
