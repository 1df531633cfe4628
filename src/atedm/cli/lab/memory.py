"""`atedm lab memory`: activation memory of a step, dense and pruned."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from atedm.cli.lab.options import Attention, BatchOption, Dtype, JsonOption, TimedGuidanceOption, TimedModelOption
from atedm.cli.options import SizeOption, pixels

MIB = 2**20


def memory(
    method: Annotated[
        str, typer.Argument(help="**matched**, **paper**, **dagger**, **turbo** or **tome**, with changes in brackets.")
    ] = "paper",
    model: TimedModelOption = "sdxl",
    dtype: Annotated[Dtype, typer.Option(rich_help_panel="Model")] = Dtype.float16,
    attention: Annotated[
        Attention, typer.Option(help="**plain** holds whole attention maps.", rich_help_panel="Model")
    ] = Attention.fused,
    size: SizeOption = None,
    batch: BatchOption = 1,
    guidance: TimedGuidanceOption = None,
    json: JsonOption = False,
) -> None:
    """Print what activations take in a step, traced without computing (supplement D).

    Every tensor counts from the operation that makes it to its last reference. Time is that of a roofline of an A100.
    """
    import torch

    from atedm.app.models import quiet_libraries
    from atedm.lab.methods.by_name import method_by_name
    from atedm.lab.methods.candidates import Pruning
    from atedm.lab.methods.peers import Merging
    from atedm.lab.probes.memory import memory as trace
    from atedm.lab.tables import markdown_table
    from atedm.suits import suits

    quiet_libraries()
    candidate = method_by_name(method, model)
    if not isinstance(candidate, Pruning | Merging):
        raise ValueError(f"memory is traced of ways to prune and of tome, not of {method!r}")
    report = trace(
        model,
        candidate.method if isinstance(candidate, Pruning) else candidate.tome,
        size=pixels(size),
        batch=batch,
        guidance=guidance,
        steps=suits(model).steps,
        dtype=getattr(torch, dtype.value),
        attention=attention.value,
    )
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    steps = {"dense": report.dense, "normal step": report.normal_step, "early step": report.early_step}
    rows = [[name, f"{step.peak / MIB:.1f}", f"{step.average / MIB:.1f}"] for name, step in steps.items()]
    typer.echo(markdown_table(["activations, MiB", "peak", "average over the step"], rows))
    typer.echo(
        f"\nweights {report.weights / MIB:.0f} MiB. More jobs in the same memory, over a run: {report.more_jobs:+.1%}; "
        f"each with its own weights {report.more_jobs_with_weights:+.1%}.\nAssumed: {report.assumption}."
    )
