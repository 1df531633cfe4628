"""`atedm bench`: what an image or a step takes with each method, in turns in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, SizeOption, at_least_one, pixels

if TYPE_CHECKING:
    from atedm.lab.bench.bench import BenchReport

DEFAULT = "dense,matched,paper,deepcache"
MORE = 'More: --steps 20 --repeats 5 --memory, and methods such as "matched,paper,dagger,tome[cost=matched],deepcache".'


def bench(
    methods: Annotated[
        str, typer.Argument(help="As `atedm evaluate` takes them: names split by commas, changes in brackets.")
    ] = DEFAULT,
    model: Annotated[
        str,
        typer.Option(
            help="**tiny**, the model that ships; **sdxl**, **sdxl-turbo**, **sd15**, **sd21** or a hub id, whose "
            "steps are timed with random weights; a folder or a file, whose own weights draw images.",
            rich_help_panel="Model",
        ),
    ] = "tiny",
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    size: SizeOption = None,
    batch: shared.BatchOption = 1,
    guidance: shared.TimedGuidanceOption = None,
    whole_images: Annotated[
        bool | None,
        typer.Option(
            "--images/--step",
            help="Time whole images, or steps of the U-Net; by default images where the weights are at hand.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Denoising steps of an image.", rich_help_panel="Images", callback=at_least_one)
    ] = 10,
    repeats: shared.RepeatsOption = 3,
    memory: Annotated[bool, typer.Option("--memory", help="Also measure the peak of activations.")] = False,
    json: shared.JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the JSON to this file.", rich_help_panel="Output")
    ] = None,
    plot: shared.PlotOption = None,
) -> None:
    """Time each method, in turns, and print it beside its cost.

    Ratios are to dense with its fastest attention, in the same round. Times of different runs do not compare.

    Examples:
    `atedm bench --model sdxl --dtype bfloat16 --no-guidance`

    `atedm bench "matched,matched[rate=0.4],tome[cost=matched]" --model sdxl-turbo`
    """
    from atedm.files import check_writable, save_json
    from atedm.lab.bench.bench import bench as measure
    from atedm.lab.methods.by_name import method_by_name, parse_methods

    check_writable(out, plot)
    setup = shared.setup_of(model, device, dtype, size, batch, guidance, repeats)
    chosen = {spec: method_by_name(spec, model, size=pixels(size), steps=steps) for spec in parse_methods(methods)}
    with shared.progress_bar() as tell:
        report = measure(setup, chosen, whole_images=whole_images, steps=steps, memory=memory, progress=tell)
    if out is not None:
        save_json(report.as_dict(), out)
    shared.show(report.as_dict(), table(report), json, plot, "bench", report)
    if methods == DEFAULT and not json:
        typer.echo(MORE)


def table(report: BenchReport) -> str:
    """Show a row a method."""
    from atedm.lab.tables import markdown_table

    peaks = any(row.peak is not None for row in report.rows.values())
    head = ["method", "cost", f"ms, {report.timed}", "time, dense = 1", *(["peak of activations, MiB"] * peaks)]
    rows = [
        [
            *(name, f"{row.cost:.3f}", f"{row.time.median:.1f}", row.ratio.text(3)),
            *([""] if row.peak is None else [f"{row.peak / 2**20:.0f}"])[: int(peaks)],
        ]
        for name, row in report.rows.items()
    ]
    return f"{report.headline()}\n\n{markdown_table(head, rows)}"
