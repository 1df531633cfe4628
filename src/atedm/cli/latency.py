"""`atedm latency`: what each part of pruning takes, beside a dense step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.options import (
    BatchOption,
    DeviceOption,
    JsonOption,
    PresetOption,
    RateOption,
    RepeatsOption,
    SizeOption,
    TimedDtypeOption,
    TimedGuidanceOption,
    TimedModelOption,
    parse_size,
    pruning_config,
)

if TYPE_CHECKING:
    from atedm.costs.latency import LatencyReport


def latency(
    model: TimedModelOption = "tiny",
    device: DeviceOption = None,
    dtype: TimedDtypeOption = None,
    preset: PresetOption = None,
    pruning_rate: RateOption = None,
    size: SizeOption = None,
    batch: BatchOption = 1,
    guidance: TimedGuidanceOption = None,
    repeats: RepeatsOption = 5,
    json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a chart into this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Print what the parts of pruning take in a run, in milliseconds and as a share of the dense run (Fig. S4).

    Each way to the attention map is timed: the whole map one head at a time, or all heads at once; and the modes that
    do without, in which "get map" is all of the ranking.
    """
    from json import dumps

    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from atedm.choices import check_name
    from atedm.costs.latency import latency as measure
    from atedm.files import check_writable, save_image
    from atedm.pictures.latency_chart import latency_chart
    from atedm.pipelines import habits, quiet_libraries

    check_writable(plot)
    if dtype is not None:
        check_name("dtype", dtype, ("float32", "bfloat16", "float16"))
    width, height = parse_size(size)
    suits = habits(model)
    name = preset or suits.preset
    quiet_libraries()
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"opening {escape(model)}", total=None)
        report = measure(
            model,
            pruning_config(name, pruning_rate),
            size=None if width is None or height is None else (width, height),
            batch=batch,
            guidance=guidance,
            steps=suits.steps,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            repeats=repeats,
            progress=lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total),
        )
    if plot is not None:
        save_image(latency_chart(report), plot)
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    for line in _table(report, name if model == "sdxl" else ""):
        typer.echo(line)
    if plot is not None:
        typer.echo(str(plot))


def _table(report: LatencyReport, paper_preset: str) -> list[str]:
    from atedm.costs.latency import PAPER
    from atedm.costs.pruning_parts import PARTS

    timed = {name: way for name, way in report.ways.items() if way.run}
    paper = PAPER.get(paper_preset, {})
    head = "".join(f"{name:>20}" for name in timed) + (f"{'paper, one A100':>20}" if paper else "")
    lines = [report.headline(), f"{'ms a run':<8}{head}"]
    for part in (*PARTS, "all"):
        line = f"{part:<8}"
        for way in timed.values():
            time = sum(way.run.values()) if part == "all" else way.run[part]
            line += f"{time:>12.1f}{time / report.dense_run:>8.1%}"
        if paper:
            line += f"{sum(paper.values()) if part == 'all' else paper[part]:>20.0f}"
        lines.append(line)
    lines += [f"{name} is left out: {way.skipped}" for name, way in report.ways.items() if way.skipped]
    dense, pruned, ratio = report.dense_step, report.pruned_step, report.step_ratio
    lines.append(
        f"a step: dense {dense.median:.1f} ms ({dense.low:.1f} to {dense.high:.1f}), pruned {pruned.median:.1f} ms "
        f"({pruned.low:.1f} to {pruned.high:.1f}), {ratio.median:.2f} of dense "
        f"({ratio.low:.2f} to {ratio.high:.2f}); a dense run {report.dense_run / 1e3:.2f} s"
    )
    return lines
