"""The commands of `atedm lab`."""

import typer

from atedm.cli.evaluate import evaluate
from atedm.cli.lab.costs import latency, memory, scaling
from atedm.cli.lab.dense_runs import agreement, errors, objects, variance

REPRODUCE = """Run one of the paper's experiments by its name: `atedm evaluate` with the methods already chosen.

Images are kept by setting and method: a run that was stopped goes on, and experiments share them.

Examples:
`atedm lab reproduce table1 --captions 100`

`atedm lab reproduce curve --guidance 7` draws one of twelve scales, as curve-guidance-7; the whole curve finds its
images.
"""

lab = typer.Typer(
    help="Measure: the paper's experiments, and probes of models and methods. Needs pip install 'atedm[lab]'.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
lab.command("reproduce", help=REPRODUCE)(evaluate)
for command in (latency, memory, variance, scaling, errors, objects, agreement):
    lab.command()(command)
