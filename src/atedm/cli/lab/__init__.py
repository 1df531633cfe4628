"""The commands of `atedm lab`: one file a command."""

from __future__ import annotations

import typer

from atedm.cli.evaluate import evaluate
from atedm.cli.lab.agreement import agreement
from atedm.cli.lab.errors import errors
from atedm.cli.lab.latency import latency
from atedm.cli.lab.memory import memory
from atedm.cli.lab.objects import objects
from atedm.cli.lab.scaling import scaling
from atedm.cli.lab.variance import variance

lab = typer.Typer(
    help="Measure: the paper's experiments, and probes of models and methods. Needs pip install 'atedm[lab]'.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
lab.command("reproduce", help=f"Run one of the paper's experiments: `atedm evaluate` by a name.\n\n{evaluate.__doc__}")(
    evaluate
)
for command in (latency, memory, variance, scaling, errors, objects, agreement):
    lab.command()(command)
