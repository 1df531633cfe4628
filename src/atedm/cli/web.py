"""`atedm web`: a page to see pruning in."""

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import options, running


def web(
    model: Annotated[
        list[str] | None,
        options.PLAIN(f"{options.MODEL_HELP} Visitors choose among all that are given.", show_default="tiny"),
    ] = None,
    port: Annotated[int | None, options.PLAIN("By default the first free one from 7860.", min=1, max=65535)] = None,
    host: Annotated[
        str, options.PLAIN("Address to listen at. Anywhere but on this machine visitors need a password.")
    ] = "127.0.0.1",
    password: Annotated[
        str | None,
        options.PLAIN("What visitors, named atedm, are asked for; made up if needed.", envvar="ATEDM_PASSWORD"),
    ] = None,
    device: options.Device = None,
    plan: Annotated[
        Path | None, options.PLAIN("A plan.json that `atedm tune` found, offered for the first model.")
    ] = None,
    out: Annotated[Path, options.PLAIN("Folder; each run has one of its own in it.")] = Path("out/web"),
) -> None:
    """Open a page in which to draw dense and pruned side by side.

    One image is drawn at a time; further visitors wait in a queue. Stop it with Ctrl+C.

    Examples:
    `atedm web`

    `atedm web --model tiny --model stabilityai/stable-diffusion-xl-base-1.0 --port 8080`

    `atedm web --model ./my-checkpoint.safetensors --plan out/tune/plan.json`
    """
    from atedm.app.models import quiet_libraries
    from atedm.lab.extra import optional
    from atedm.plans.plan import read_plan

    optional("gradio", "web")
    from atedm.web.serve import serve

    found = None if plan is None else read_plan(plan)
    quiet_libraries()
    with running.status("opening the page"):
        served = serve(model or ["tiny"], out, host=host, port=port, password=password, device=device, plan=found)
    typer.echo(f"{served.url}  (Ctrl+C stops it)")
    if served.password is not None:
        typer.echo(f"visitors give the name atedm and the password {served.password}")
    served.wait()
