"""What commands open, tell and print while they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from atedm.cli.options import Precision, pixels

if TYPE_CHECKING:
    from atedm.lab.evaluation.images import Drawing
    from atedm.lab.setup import Setup
    from atedm.method.contract import Method

#: Told what is being done, how much of it is done, and of how much.
Tell: TypeAlias = Callable[[str, float, float], None]


def method_of(spec: str, model: str, steps: int = 50) -> Method:
    """Read the way to prune that ``spec`` describes."""
    from atedm.lab.methods.by_name import method_by_name
    from atedm.lab.methods.candidates import Pruning

    candidate = method_by_name(spec, model, steps=steps)
    if not isinstance(candidate, Pruning):
        raise ValueError(f"this looks at how tokens are pruned, which {spec!r} does not do")
    return candidate.method


def setup_of(model: str, size: str | None, dtype: Precision | None, **others: Any) -> Setup:
    """Fill in what was not asked for; others as `Setup.of`."""
    from atedm.app.models import quiet_libraries
    from atedm.lab.setup import Setup

    quiet_libraries()
    return Setup.of(model, size=pixels(size), dtype=None if dtype is None else dtype.value, **others)


def drawing_of(
    model: str, steps: int | None, guidance: float | None, seed: int, batch: int, size: str | None = None
) -> Drawing:
    """Fill in the steps and the guidance that suit the model."""
    from atedm.lab.evaluation.images import Drawing
    from atedm.suits import suits

    usual, (width, height) = suits(model), pixels(size) or (None, None)
    scale = usual.guidance if guidance is None else guidance
    return Drawing(model, steps or usual.steps, scale, seed, batch, width, height)


def open_pipeline(model: str, device: str | None, dtype: Precision | None = None) -> Any:
    """Open a pipeline, and say so while it lasts."""
    import torch

    from atedm.app.models import load_pipeline, quiet_libraries

    quiet_libraries()
    with status(f"opening {model}"):
        return load_pipeline(model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value))


def status(what: str) -> AbstractContextManager[object]:
    """Say in a terminal what is being done while it lasts."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(escape(what))


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Tell]:
    """Show how far the work is and how long it will take; yields what is to be told.

    In a terminal that is a bar; elsewhere, as in a log, a line now and then.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _lines(lambda line: console.print(line, markup=False, highlight=False))
        return
    # A group of images may take minutes, and the time left is told from the speed over this many seconds.
    with Progress(console=console, speed_estimate_period=1800) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


def _lines(say: Callable[[str], None], every: float = 30, now: Callable[[], float] = time.monotonic) -> Tell:
    """Tell of progress by lines, ``every`` so many seconds at most; the time left is judged by the speed so far."""
    start, last_total, last_said = now(), 0.0, -every

    def tell(what: str, done: float, total: float) -> None:
        nonlocal start, last_total, last_said
        if total != last_total:  # other work
            start, last_total = now(), total
        spent = now() - start
        if not 0 < done < total or now() - last_said < every:
            return
        last_said = now()
        left = spent / done * (total - done)
        say(f"{what}: {done:.0f} of {total:.0f}, about {f'{left:.0f} s' if left < 90 else f'{left / 60:.0f} min'} left")

    return tell


def show(content: Any, text: str, as_json: bool, plot: Path | None = None, chart: str = "", *drawn: Any) -> None:
    """Print a report as JSON or as text; ``chart``, "FILE.FUNCTION" of `atedm.lab.charts`, plots what is ``drawn``."""
    from atedm.files import save_image

    if plot is not None:
        file, _, function = chart.partition(".")
        save_image(getattr(import_module(f"atedm.lab.charts.{file}"), function)(*drawn), plot)
    typer.echo(dumps(content, indent=2) if as_json else text)
    if plot is not None and not as_json:
        typer.echo(str(plot))
