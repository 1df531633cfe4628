"""Options that the commands of the laboratory share, and what they open and print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.options import at_least_one, checked_guidance, checked_seed, pixels

if TYPE_CHECKING:
    from atedm.lab.evaluation.images import Drawing
    from atedm.lab.progress import Progress
    from atedm.lab.setup import Setup
    from atedm.method.contract import Method


class Dtype(str, Enum):
    """Precisions of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def checked_rate(rate: float) -> float:
    """See that some tokens are dropped and some are kept."""
    if not 0 < rate < 1:
        raise ValueError(f"rate must be above 0, for there to be dropped tokens, and below 1, not {rate}")
    return rate


IMAGES = "Images"
TimedModelOption = Annotated[
    str,
    typer.Option(
        help="**tiny**, **sdxl**, **sdxl-turbo**, **sd15**, **sd21**, a diffusers folder or a hub id, of which only "
        "the config is read.",
        rich_help_panel="Model",
    ),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="By default what suits the device.", rich_help_panel="Model")]
CaptionsOption = Annotated[
    int, typer.Option(help="How many held-out scenes to draw.", rich_help_panel=IMAGES, callback=at_least_one)
]
StepsOption = Annotated[int, typer.Option(help="Denoising steps.", rich_help_panel=IMAGES, callback=at_least_one)]
GuidanceOption = Annotated[
    float | None,
    typer.Option(help="Scale; by default what suits the model.", rich_help_panel=IMAGES, callback=checked_guidance),
]
TimedGuidanceOption = Annotated[
    bool | None,
    typer.Option(help="Whether the U-Net runs on two of each image; by default as usual.", rich_help_panel=IMAGES),
]
SeedOption = Annotated[
    int, typer.Option(help="Of the first image, and of the scenes.", rich_help_panel=IMAGES, callback=checked_seed)
]
BatchOption = Annotated[int, typer.Option(help="Images at a time.", rich_help_panel=IMAGES, callback=at_least_one)]
MethodOption = Annotated[
    str,
    typer.Option(
        help="**matched**, **paper**, **dagger** or **turbo**, with changes in brackets: paper[rate=0.5].",
        rich_help_panel="Pruning",
    ),
]
RateOption = Annotated[
    float, typer.Option(help="Share of the tokens that is dropped.", rich_help_panel="Pruning", callback=checked_rate)
]
RepeatsOption = Annotated[int, typer.Option(help="Rounds, after one to warm up.", callback=at_least_one)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with everything.", rich_help_panel="Output")]
PlotOption = Annotated[Path | None, typer.Option(help="Also draw a chart into this PNG.", rich_help_panel="Output")]


def method_of(spec: str, model: str, steps: int = 50) -> Method:
    """Read the way to prune that ``spec`` describes."""
    from atedm.lab.methods.by_name import method_by_name
    from atedm.lab.methods.candidates import Pruning

    candidate = method_by_name(spec, model, steps=steps)
    if not isinstance(candidate, Pruning):
        raise ValueError(f"this looks at how tokens are pruned, which {spec!r} does not do")
    return candidate.method


def setup_of(
    model: str,
    device: str | None,
    dtype: Dtype | None,
    size: str | None,
    batch: int,
    guidance: bool | None,
    repeats: int,
) -> Setup:
    """Fill in what was not asked for."""
    from atedm.app.models import quiet_libraries
    from atedm.lab.setup import Setup

    quiet_libraries()
    precision = None if dtype is None else dtype.value
    return Setup.of(
        model, size=pixels(size), batch=batch, guidance=guidance, dtype=precision, device=device, repeats=repeats
    )


def drawing_of(
    model: str, steps: int, guidance: float | None, seed: int, batch: int, size: str | None = None
) -> Drawing:
    """Fill in the guidance that suits the model."""
    from atedm.lab.evaluation.images import Drawing
    from atedm.suits import suits

    width, height = pixels(size) or (None, None)
    return Drawing(model, steps, suits(model).guidance if guidance is None else guidance, seed, batch, width, height)


def open_pipeline(model: str, device: str | None, dtype: Dtype | None) -> Any:
    """Open a pipeline, and say so while it lasts."""
    import torch
    from rich.console import Console
    from rich.markup import escape

    from atedm.app.models import load_pipeline, quiet_libraries

    quiet_libraries()
    with Console(stderr=True).status(f"opening {escape(model)}"):
        return load_pipeline(model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value))


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """Show how far the work is and how long it will take; yields what is to be told.

    In a terminal that is a bar; elsewhere, as in a log, a line now and then.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bar

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _lines(lambda line: console.print(line, markup=False, highlight=False))
        return
    # A group of images may take minutes, and the time left is told from the speed over this many seconds.
    with Bar(console=console, speed_estimate_period=1800) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


def _lines(say: Callable[[str], None], every: float = 30, now: Callable[[], float] = time.monotonic) -> Progress:
    """Tell of progress by lines, ``every`` so many seconds at most; the time left is judged by the speed so far."""
    start, last_total, last_said = now(), 0, -every

    def tell(what: str, done: int, total: int) -> None:
        nonlocal start, last_total, last_said
        if total != last_total:  # other work
            start, last_total = now(), total
        spent = now() - start
        if not 0 < done < total or now() - last_said < every:
            return
        last_said = now()
        left = spent / done * (total - done)
        say(f"{what}: {done} of {total}, about {f'{left:.0f} s' if left < 90 else f'{left / 60:.0f} min'} left")

    return tell


def show(content: Any, text: str, as_json: bool, plot: Path | None = None, chart: str = "", *drawn: Any) -> None:
    """Print a report, as JSON or as text; where a plot is asked for, draw ``atedm.lab.charts.CHART`` of ``drawn``."""
    from atedm.files import save_image

    if plot is not None:
        save_image(getattr(import_module(f"atedm.lab.charts.{chart}"), f"{chart}_chart")(*drawn), plot)
    typer.echo(dumps(content, indent=2) if as_json else text)
    if plot is not None and not as_json:
        typer.echo(str(plot))
