"""`atedm lab variance`: how much attention maps tell tokens apart, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, ModelOption, SizeOption, StepsOption

if TYPE_CHECKING:
    from atedm.lab.probes.variance import VarianceReport

_ROWS = 11


def variance(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One image each. Without any, a good set for the model.", show_default=False),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    steps: StepsOption = None,
    guidance: shared.GuidanceOption = None,
    size: SizeOption = None,
    seed: shared.SeedOption = 0,
    threshold: Annotated[float, typer.Option(help="Variance to look for; the paper's by default.")] = 1e-5,
    json: shared.JsonOption = False,
    plot: shared.PlotOption = None,
) -> None:
    """Print the variance of the attention maps in each denoising step, dense: the reason to prune less early.

    The paper finds it above 1e-5 after the first 15 of 50 steps (Fig. 5). The entries of a map average 1 / tokens, so
    a threshold says something about one number of tokens; the relative variance, times tokens squared, compares.
    """
    from atedm.files import check_writable
    from atedm.lab.probes.variance import attention_variance
    from atedm.suits import suits

    check_writable(plot)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, not {threshold}")
    usual = suits(model)
    drawing = shared.drawing_of(model, steps or usual.steps, guidance, seed, 1, size)
    pipe = shared.open_pipeline(model, device, None)
    with shared.progress_bar() as tell:
        report = attention_variance(pipe, list(prompts or usual.prompts), drawing, progress=tell)
    content = {"model": model, **report.as_dict(threshold)}
    title = f"{model}, {report.images} images, dense"
    shared.show(content, table(report, threshold), json, plot, "variance", report, threshold, title)


def table(report: VarianceReport, threshold: float) -> str:
    """Show some of the steps, the first and the last among them, and where the threshold is first exceeded."""
    from atedm.lab.tables import markdown_table

    shown = sorted({round(i * (report.steps - 1) / (_ROWS - 1)) for i in range(_ROWS)})
    columns = {"mean": report.mean_by_step(), "relative": report.mean_by_step("relative_per_head")}
    columns |= {f"level {level}": values for level, values in report.mean_by_level().items()}
    rows = [[step, *(f"{values[step]:.2g}" for values in columns.values())] for step in shown]
    first = report.first_step_above(threshold)
    said = f"the mean is never above {threshold:g}"
    if first is not None:
        before = f"{first} of {report.steps} steps come before it, {first / report.steps:.0%} of the run"
        said = f"the mean is first above {threshold:g} in step {first}: {before}"
    return f"{markdown_table(['step', *columns], rows)}\n\n{said} (in the paper 30%, 15 of 50)"
