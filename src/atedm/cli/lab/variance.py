"""`atedm lab variance`: how much attention maps tell tokens apart, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.lab.options import GuidanceOption, JsonOption, PlotOption, SeedOption, open_pipeline, progress_bar, show
from atedm.cli.options import DeviceOption, ModelOption, SizeOption, at_least_one, pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from atedm.lab.probes.variance import VarianceReport

_SHOWN = 11
"""Rows of the table, at most."""


def variance(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One image each. Without any, a good set for the model.", show_default=False),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps; 50, or 4 for few-step models.", rich_help_panel="Images", callback=at_least_one
        ),
    ] = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
    threshold: Annotated[float, typer.Option(help="Variance to look for; the paper's by default.")] = 1e-5,
    json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Print the variance of the attention maps in each denoising step, dense: the reason to prune less early.

    The paper finds it above 1e-5 after the first 15 of 50 steps (Fig. 5). The entries of a map average 1 / tokens, so
    a threshold says something about one number of tokens; the relative variance, times tokens squared, compares.
    """
    from atedm.files import check_writable
    from atedm.lab.evaluation.images import Drawing
    from atedm.lab.probes.variance import attention_variance
    from atedm.suits import suits

    check_writable(plot)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, not {threshold}")
    usual = suits(model)
    width, height = pixels(size) or (None, None)
    scale = usual.guidance if guidance is None else guidance
    drawing = Drawing(model, usual.steps if steps is None else steps, scale, seed, 1, width, height)
    pipe = open_pipeline(model, device, None)
    with progress_bar() as tell:
        report = attention_variance(pipe, list(prompts or usual.prompts), drawing, progress=tell)

    def draw() -> Image:
        from atedm.lab.charts.variance import variance_chart

        return variance_chart(report, threshold, f"{model}, {report.images} images, dense")

    show({"model": model, **report.as_dict(threshold)}, table(report, threshold), json, plot, draw)


def table(report: VarianceReport, threshold: float) -> str:
    """Show some of the steps, the first and the last among them, and where the threshold is first exceeded."""
    from atedm.lab.probes.variance import EARLY_SHARE
    from atedm.lab.tables import markdown_table

    last = report.steps - 1
    shown = sorted({round(i * last / max(1, _SHOWN - 1)) for i in range(_SHOWN)})
    columns = {"mean": report.mean_by_step(), "relative": report.mean_by_step("relative_per_head")}
    columns |= {f"level {level}": values for level, values in report.mean_by_level().items()}
    rows = [
        [step, *(f"{v[step]:.2f}" if name == "relative" else f"{v[step]:.1e}" for name, v in columns.items())]
        for step in shown
    ]
    first = report.first_step_above(threshold)
    paper = f"in the paper {EARLY_SHARE:.0%}, 15 of 50"
    if first is None:
        said = f"the mean is never above {threshold:g} ({paper})"
    else:
        before = f"{first} of {report.steps} steps come before it, {first / report.steps:.0%} of the run"
        said = f"the mean is first above {threshold:g} in step {first}: {before} ({paper})"
    return f"{markdown_table(['step', *columns], rows)}\n\n{said}"
