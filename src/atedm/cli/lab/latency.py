"""`atedm lab latency`: what each part of pruning takes, beside a dense run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, SizeOption

if TYPE_CHECKING:
    from atedm.lab.probes.latency import LatencyReport


def latency(
    model: shared.TimedModelOption = "tiny",
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    method: shared.MethodOption = "paper",
    size: SizeOption = None,
    batch: shared.BatchOption = 1,
    guidance: shared.TimedGuidanceOption = None,
    repeats: shared.RepeatsOption = 5,
    json: shared.JsonOption = False,
    plot: shared.PlotOption = None,
) -> None:
    """Print what the parts of AT-EDM take in a run, in milliseconds and as a share of the dense run (Fig. S4).

    Each way to the attention map is timed: the whole map one head at a time, or all heads at once; and the modes that
    do without, in which "get map" is all of the ranking. Weights are random.
    """
    from atedm.files import check_writable
    from atedm.lab.probes.latency import latency as measure
    from atedm.suits import suits

    check_writable(plot)
    setup = shared.setup_of(model, device, dtype, size, batch, guidance, repeats)
    with shared.progress_bar() as tell:
        report = measure(setup, shared.method_of(method, model), suits(model).steps, tell)
    shared.show(report.as_dict(), table(report, method if model == "sdxl" else ""), json, plot, "latency", report)


def table(report: LatencyReport, paper: str) -> str:
    """Show the parts, one a row; beside the paper's own figures where ``paper`` names one of its methods."""
    from atedm.lab.probes.latency import PAPER
    from atedm.lab.tables import markdown_table

    runs = {name: run | {"all": sum(run.values())} for name, run in report.ways.items()}
    theirs = PAPER.get(paper, {})
    rows = []
    for part in next(iter(runs.values())):
        times = [f"{run[part]:.1f} ({run[part] / report.dense_run:.1%})" for run in runs.values()]
        rows.append([part, *times, *([f"{theirs.get(part, sum(theirs.values())):.0f}"] if theirs else [])])
    head = ["ms a run", *runs, *(["paper, one A100"] if theirs else [])]
    lines = [f"{name} is left out: {why}" for name, why in report.left_out.items()]
    lines.append(f"a dense step: {report.dense_step.text()} ms; a dense run: {report.dense_run / 1e3:.2f} s")
    return "\n".join([report.headline(), "", markdown_table(head, rows), "", *lines])
