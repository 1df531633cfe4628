"""`atedm bench`: what an image or a step takes with each method, in turns in one run."""

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import options, running

DEFAULT = "dense,matched,paper,deepcache"
MORE = 'More: --steps 20 --repeats 5 --memory, and methods such as "matched,paper,dagger,tome[cost=matched],deepcache".'


def bench(
    methods: Annotated[
        str, typer.Argument(help="As `atedm evaluate` takes them: names split by commas, changes in brackets.")
    ] = DEFAULT,
    model: Annotated[
        str,
        options.MODEL(
            "**tiny**, the model that ships; **sdxl**, **sdxl-turbo**, **sd15**, **sd21** or a hub id, whose steps "
            "are timed with random weights; a folder or a file, whose own weights draw images."
        ),
    ] = "tiny",
    device: options.Device = None,
    dtype: options.Dtype = None,
    size: options.Size = None,
    batch: options.Batch = 1,
    guidance: options.IsGuided = None,
    whole_images: Annotated[
        bool | None,
        options.PLAIN("Time whole images, or steps; by default images if weights are at hand.", "--images/--step"),
    ] = None,
    steps: options.StepsOfProbe = 10,
    repeats: options.Repeats = 3,
    memory: Annotated[bool, options.PLAIN("Also measure the peak of activations.", "--memory")] = False,
    json: options.Json = False,
    out: Annotated[Path | None, options.OUTPUT("Also write the JSON to this file.")] = None,
    plot: options.Plot = None,
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
    from atedm.lab.tables import markdown_table

    check_writable(out, plot)
    setup = running.setup_of(model, size, dtype, device=device, batch=batch, guidance=guidance, repeats=repeats)
    sides = options.pixels(size)
    chosen = {spec: method_by_name(spec, model, size=sides, steps=steps) for spec in parse_methods(methods)}
    with running.progress_bar() as tell:
        report = measure(setup, chosen, whole_images=whole_images, steps=steps, memory=memory, progress=tell)
    if out is not None:
        save_json(report.as_dict(), out)
    head = ["method", "cost", f"ms, {report.timed}", "time, dense = 1"]
    rows = [[name, f"{r.cost:.3f}", f"{r.time.median:.1f}", r.ratio.text(3)] for name, r in report.rows.items()]
    if any(row.peak is not None for row in report.rows.values()):
        head.append("peak of activations, MiB")
        for cells, row in zip(rows, report.rows.values(), strict=True):
            cells.append("" if row.peak is None else f"{row.peak / 2**20:.0f}")
    text = f"{report.headline()}\n\n{markdown_table(head, rows)}"
    running.show(report.as_dict(), text, json, plot, "times.bench_chart", report)
    if methods == DEFAULT and not json:
        typer.echo(MORE)
