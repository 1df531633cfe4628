"""The command line: nothing heavy imported before a command runs."""

import os
import re
import sys

import typer

from atedm.cli.bench import bench
from atedm.cli.cost import cost
from atedm.cli.evaluate import evaluate
from atedm.cli.finetune import finetune
from atedm.cli.fit import fit
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
def about(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Show the version, or go on to the command."""
    if version:
        from atedm import __version__

        typer.echo(__version__)
        raise typer.Exit


for command in (generate, web, cost, bench, evaluate, tune, fit, finetune):
    app.command()(command)
app.add_typer(lab, name="lab")


def main() -> None:
    """Run the command line; what the user got wrong ends in one line and status 2."""
    # Notes of torch's profiler go past Python to the terminal. Torch reads these when it is first imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
    except RuntimeError as error:
        if not re.search("out of memory|allocate|storage size", str(error), re.IGNORECASE):
            raise
        line = f"this takes more memory than there is ({str(error).strip().splitlines()[0]})"
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    typer.secho(f"atedm: {line}", err=True, fg="red")
    sys.exit(2)
