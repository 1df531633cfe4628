"""How long work tells of its progress."""

from collections.abc import Callable
from typing import TypeAlias

#: Told what is being done, how much of it is done, and of how much.
Progress: TypeAlias = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
