"""A bar for work that comes in rounds of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def rounds_shown(console: Console, rounds: int) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar of so many rounds; yields what is told of every step: what, which step, of how many in the round."""
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=console) as bar:
        task = bar.add_task("images", total=rounds)
        whole = 0

        def on_step(what: str, step: int, steps: int) -> None:
            nonlocal whole
            bar.update(task, description=escape(what), completed=whole + step / steps)
            whole += step == steps

        yield on_step
        bar.update(task, description="images")
