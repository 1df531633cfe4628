"""`atedm variance`: how much attention maps tell tokens apart, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.options import DeviceOption, ModelOption, parse_size
from atedm.cli.progress import rounds_shown

if TYPE_CHECKING:
    from atedm.costs.variance import VarianceReport

_SHOWN = 11


def variance(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One image each. Without any, a good set for the model.", show_default=False),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; 50, or 4 for few-step models.", rich_help_panel="Image")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; by default what suits the model.", rich_help_panel="Image")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WxH in pixels; by default the model's own.", rich_help_panel="Image")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; each next has one more.", rich_help_panel="Image")
    ] = 0,
    threshold: Annotated[float, typer.Option(help="Variance to look for; the paper's by default.")] = 1e-5,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, every block in every step.", rich_help_panel="Output")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a chart into this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Print the variance of the attention maps in each denoising step, dense: the reason to prune less early.

    The paper finds it above 1e-5 after the first 15 of 50 steps (Fig. 5). The entries of a map average 1 / tokens, so
    a threshold says something about one number of tokens; the relative variance, times tokens squared, compares.
    """
    from json import dumps

    from rich.console import Console
    from rich.markup import escape

    from atedm.costs.variance import attention_variance
    from atedm.files import check_writable, save_image
    from atedm.pictures.variance_chart import variance_chart
    from atedm.pipelines import habits, load_pipeline, quiet_libraries

    check_writable(plot)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, not {threshold}")
    suits = habits(model)
    width, height = parse_size(size)
    prompts = list(prompts or suits.prompts)
    console = Console(stderr=True)
    quiet_libraries()
    with console.status(f"opening {escape(model)}"):
        pipe = load_pipeline(model, device=device)
    with rounds_shown(console, len(prompts)) as on_call:
        report = attention_variance(
            pipe,
            prompts,
            steps=suits.steps if steps is None else steps,
            guidance=suits.guidance if guidance is None else guidance,
            width=width,
            height=height,
            seed=seed,
            progress=on_call,
        )
    if plot is not None:
        save_image(variance_chart(report, threshold, f"{model}, {len(prompts)} images, dense"), plot)
    if json:
        typer.echo(dumps({"model": model, **report.as_dict(threshold)}, indent=2))
        return
    for line in _table(report, threshold):
        typer.echo(line)
    if plot is not None:
        typer.echo(str(plot))


def _table(report: VarianceReport, threshold: float) -> list[str]:
    from atedm.costs.variance import PRUNE_LESS_SHARE

    last = report.steps - 1
    shown = sorted({round(i * last / max(1, _SHOWN - 1)) for i in range(_SHOWN)})
    columns = {"mean": report.mean_by_step(), "relative": report.mean_by_step("relative_per_head")}
    columns |= {f"level {level}": values for level, values in report.mean_by_level().items()}
    lines = ["step" + "".join(f"{name:>10}" for name in columns)]
    for step in shown:
        cells = [f"{v[step]:.2f}" if name == "relative" else f"{v[step]:.1e}" for name, v in columns.items()]
        lines.append(f"{step:>4}" + "".join(f"{cell:>10}" for cell in cells))
    first = report.first_step_above(threshold)
    paper = f"in the paper {PRUNE_LESS_SHARE:.0%}, 15 of 50"
    if first is None:
        lines.append(f"the mean is never above {threshold:g} ({paper})")
    else:
        before = f"{first} of {report.steps} steps come before it, {first / report.steps:.0%} of the run"
        lines.append(f"the mean is first above {threshold:g} in step {first}: {before} ({paper})")
    return lines
