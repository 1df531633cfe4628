"""`atedm bench`: what a step takes with each method, in turns in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.options import (
    BatchOption,
    DeviceOption,
    JsonOption,
    RepeatsOption,
    SizeOption,
    TimedDtypeOption,
    TimedGuidanceOption,
    TimedModelOption,
    parse_size,
)

if TYPE_CHECKING:
    from atedm.bench import BenchReport


def bench(
    methods: Annotated[
        str, typer.Argument(help="As `atedm evaluate` takes them: presets and **tome**, with changes in brackets.")
    ] = "dense,paper,dagger,matched,tome[cost=matched]",
    model: TimedModelOption = "tiny",
    device: DeviceOption = None,
    dtype: TimedDtypeOption = None,
    size: SizeOption = None,
    batch: BatchOption = 1,
    guidance: TimedGuidanceOption = None,
    repeats: RepeatsOption = 5,
    json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Time a step of the U-Net with each method, in turns, and print it beside the arithmetic.

    Ratios are to dense with its fastest attention, in the same round. Times of different runs do not compare.

    Examples:
    `atedm bench --model sdxl --dtype bfloat16 --no-guidance --repeats 3`

    `atedm bench "matched,matched[pruning_rate=0.4],tome[cost=matched]" --model sdxl-turbo`
    """
    from json import dumps

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from atedm.bench import bench as measure
    from atedm.choices import check_name
    from atedm.evaluation.methods_by_name import method_by_name, parse_methods
    from atedm.generate import save_json
    from atedm.pipelines import quiet_libraries

    if dtype is not None:
        check_name("dtype", dtype, ("float32", "bfloat16", "float16"))
    width, height = parse_size(size)
    pixels = None if width is None or height is None else (width, height)
    quiet_libraries()
    chosen = {spec: method_by_name(spec, model, size=pixels) for spec in parse_methods(methods)}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"opening {model}", total=None)
        report = measure(
            model,
            chosen,
            size=pixels,
            batch=batch,
            guidance=guidance,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            repeats=repeats,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_json(report.as_dict(), out)
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    for line in _table(report):
        typer.echo(line)


def _table(report: BenchReport) -> list[str]:
    lines = [report.headline(), "", "| method | arithmetic | ms a step | time, dense = 1 |", "|---|---|---|---|"]
    for name, row in report.rows.items():
        ratio = f"{row.ratio.median:.3f} ({row.ratio.low:.3f} to {row.ratio.high:.3f})"
        lines.append(f"| {name} | {row.arithmetic:.3f} | {row.step.median:.1f} | {ratio} |")
    return lines
