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
    at_least_one,
    parse_size,
)

if TYPE_CHECKING:
    from atedm.bench import BenchReport


def bench(
    methods: Annotated[
        str,
        typer.Argument(help="As `atedm evaluate` takes them: presets, **tome**, **deepcache**, changes in brackets."),
    ] = "dense,paper,paper[refresh_every=1000],dagger,matched,tome[cost=matched],deepcache",
    model: Annotated[
        str,
        typer.Option(
            help="**tiny**, the model that ships; **sdxl**, **sdxl-turbo**, **sd15**, **sd21** or a hub id, whose "
            "steps are timed with random weights; a folder or a file, whose own weights draw images.",
            rich_help_panel="Model",
        ),
    ] = "tiny",
    device: DeviceOption = None,
    dtype: TimedDtypeOption = None,
    size: SizeOption = None,
    batch: BatchOption = 1,
    guidance: TimedGuidanceOption = None,
    whole_images: Annotated[
        bool | None,
        typer.Option(
            "--images/--step",
            help="Time whole images, or steps of the U-Net; by default images where the weights are at hand.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Denoising steps of an image.", rich_help_panel="Image", callback=at_least_one)
    ] = 20,
    repeats: RepeatsOption = 5,
    memory: Annotated[bool, typer.Option(help="Also measure the peak of activations, in one round more.")] = True,
    json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file.", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a chart into this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Time each method, in turns, and print it beside the arithmetic.

    Ratios are to dense with its fastest attention, in the same round. Times of different runs do not compare. With
    `refresh_every=1000` a choice of tokens is known beforehand, which no way to make it can beat.

    Examples:
    `atedm bench --model sdxl --dtype bfloat16 --no-guidance --repeats 3`

    `atedm bench "matched,matched[pruning_rate=0.4],tome[cost=matched]" --model sdxl-turbo`
    """
    from json import dumps

    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from atedm.bench import bench as measure
    from atedm.choices import check_name
    from atedm.evaluation.methods_by_name import method_by_name, parse_methods
    from atedm.files import check_writable, save_image, save_json
    from atedm.pictures.bench_chart import bench_chart
    from atedm.pipelines import quiet_libraries

    check_writable(out, plot)
    if dtype is not None:
        check_name("dtype", dtype, ("float32", "bfloat16", "float16"))
    width, height = parse_size(size)
    pixels = None if width is None or height is None else (width, height)
    quiet_libraries()
    chosen = {spec: method_by_name(spec, model, size=pixels, steps=steps) for spec in parse_methods(methods)}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"opening {escape(model)}", total=None)
        report = measure(
            model,
            chosen,
            whole_images=whole_images,
            steps=steps,
            size=pixels,
            batch=batch,
            guidance=guidance,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            repeats=repeats,
            memory=memory,
            progress=lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total),
        )
    if out is not None:
        save_json(report.as_dict(), out)
    if plot is not None:
        save_image(bench_chart(report), plot)
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    for line in _table(report):
        typer.echo(line)


def _table(report: BenchReport) -> list[str]:
    head = ["method", "arithmetic", f"ms {'an image' if report.timed == 'image' else 'a step'}", "time, dense = 1"]
    peaks = [row.peak for row in report.rows.values()]
    if None not in peaks:
        head.append("peak of activations, MiB")
    lines = [report.headline(), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (name, row), peak in zip(report.rows.items(), peaks, strict=True):
        ratio = f"{row.ratio.median:.3f} ({row.ratio.low:.3f} to {row.ratio.high:.3f})"
        cells = [name, f"{row.arithmetic:.3f}", f"{row.time.median:.1f}", ratio]
        cells += [] if peak is None else [f"{peak / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
