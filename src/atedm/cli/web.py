"""`atedm web`: a page to see pruning in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.options import MODEL_HELP, DeviceOption


def web(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"{MODEL_HELP} Several may be given; visitors choose among these only.", show_default="tiny"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860.", min=1, max=65535)] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Anywhere but on this machine visitors need a password.")
    ] = "127.0.0.1",
    password: Annotated[
        str | None,
        typer.Option(
            help="What visitors, named atedm, are asked for; made up where one is needed.", envvar="ATEDM_PASSWORD"
        ),
    ] = None,
    device: DeviceOption = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json that `atedm tune` found, offered for the first model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder; each run has one of its own in it.")] = Path("out/web"),
) -> None:
    """Open a page in which to draw dense and pruned side by side.

    One image is drawn at a time; further visitors wait in a queue. Stop it with Ctrl+C.

    Examples:
    `atedm web`

    `atedm web --model tiny --model stabilityai/stable-diffusion-xl-base-1.0 --port 8080`

    `atedm web --model ./my-checkpoint.safetensors --plan out/tune/plan.json`
    """
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ImportError("the page needs gradio: pip install 'atedm[web]'")
    from rich.console import Console

    from atedm.app.models import quiet_libraries
    from atedm.plans.plan import read_plan
    from atedm.web.serve import serve

    found = None if plan is None else read_plan(plan)
    quiet_libraries()
    console = Console(stderr=True)
    with console.status("opening the page"):
        served = serve(model or ["tiny"], out, host=host, port=port, password=password, device=device, plan=found)
    typer.echo(f"{served.url}  (Ctrl+C stops it)")
    if served.password is not None:
        typer.echo(f"visitors give the name atedm and the password {served.password}")
    served.wait()
