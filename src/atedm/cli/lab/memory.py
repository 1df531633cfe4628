"""`atedm lab memory`: activation memory of a step, dense and pruned."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import SizeOption, pixels

MIB = 2**20


class Attention(str, Enum):
    """How attention runs."""

    fused = "fused"
    plain = "plain"


def memory(
    method: Annotated[
        str, typer.Argument(help="**matched**, **paper**, **dagger**, **turbo** or **tome**, with changes in brackets.")
    ] = "paper",
    model: shared.TimedModelOption = "sdxl",
    dtype: Annotated[shared.Dtype, typer.Option(rich_help_panel="Model")] = shared.Dtype.float16,
    attention: Annotated[
        Attention, typer.Option(help="**plain** holds whole attention maps.", rich_help_panel="Model")
    ] = Attention.fused,
    size: SizeOption = None,
    batch: shared.BatchOption = 1,
    guidance: shared.TimedGuidanceOption = None,
    json: shared.JsonOption = False,
) -> None:
    """Print what activations take in a step, traced without computing (supplement D).

    Every tensor counts from the operation that makes it to its last reference. Time is that of a roofline of an A100.
    """
    import torch

    from atedm.app.models import quiet_libraries
    from atedm.lab.methods.by_name import method_by_name
    from atedm.lab.probes.memory import memory as trace
    from atedm.lab.tables import markdown_table

    quiet_libraries()
    report = trace(
        model,
        method_by_name(method, model),
        size=pixels(size),
        batch=batch,
        guidance=guidance,
        dtype=getattr(torch, dtype.value),
        attention=attention.value,
    )
    steps = {"dense": report.dense, "normal step": report.normal_step, "early step": report.early_step}
    rows = [[name, f"{step.peak / MIB:.1f}", f"{step.average / MIB:.1f}"] for name, step in steps.items()]
    text = (
        f"{markdown_table(['activations, MiB', 'peak', 'average over the step'], rows)}\n\n"
        f"weights {report.weights / MIB:.0f} MiB. More jobs in the same memory, over a run: {report.more_jobs:+.1%}; "
        f"each with its own weights {report.more_jobs_with_weights:+.1%}.\nAssumed: {report.assumption}."
    )
    shared.show(report.as_dict(), text, json)
