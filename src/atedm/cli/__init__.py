"""The command line: one file a command, nothing heavy imported before a command runs."""

from __future__ import annotations

import os
import re
import sys

import typer

from atedm.cli.bench import bench
from atedm.cli.cost import cost
from atedm.cli.evaluate import evaluate
from atedm.cli.finetune import finetune
from atedm.cli.generate import generate
from atedm.cli.lab import lab
from atedm.cli.tune import tune
from atedm.cli.web import web

app = typer.Typer(
    name="atedm",
    help="AT-EDM: attention-driven, training-free token pruning for diffusion U-Nets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def about(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and stop.")
) -> None:
    """Show the version, or go on to the command."""
    if version:
        from atedm import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(generate)
app.command()(web)
app.command()(cost)
app.command()(bench)
app.command()(evaluate)
app.command()(tune)
app.command()(finetune)
app.add_typer(lab, name="lab")


_LOGS = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Notes of torch's profiler, which go past Python to the terminal; read when torch is first imported."""


def main() -> None:
    """Run the command line; what the user got wrong ends in one line and status 2."""
    for name, level in _LOGS.items():
        os.environ.setdefault(name, level)
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        typer.secho(f"atedm: {line}", err=True, fg="red")
        sys.exit(2)
    except RuntimeError as error:
        if not re.search("out of memory|allocate|storage size", str(error), re.IGNORECASE):
            raise
        line = str(error).strip().splitlines()[0]
        typer.secho(f"atedm: this takes more memory than there is ({line})", err=True, fg="red")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
