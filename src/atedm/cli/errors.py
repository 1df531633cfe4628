"""`atedm errors`: where pruning errs, block by block, and how the errors of a run add up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.evaluation_options import (
    BatchOption,
    DtypeOption,
    GuidanceOption,
    PromptsOption,
    SeedOption,
    StepsOption,
    opened_alone,
)
from atedm.cli.options import DeviceOption, ModelOption
from atedm.cli.progress import rounds_shown

if TYPE_CHECKING:
    from atedm.evaluation.errors import ErrorsReport

_STAYS = "refresh_every=1000,rematch=true"
METHODS = {
    "AT-EDM": "paper",
    "AT-EDM, kept at random": "paper[ranking=uniform-random]",
    "matched by a lattice": "matched[own_update_share=0,ranking=lattice]",
    "matched by a lattice that stays": f"matched[own_update_share=0,ranking=lattice,{_STAYS}]",
    "matched, no own update": "matched[own_update_share=0]",
    "matched, no own update, kept set stays": f"matched[own_update_share=0,{_STAYS}]",
    "matched": "matched",
}
"""The paper's, a control, and ours: with a kept set that moves and one that stays, and as it is."""


def errors(
    methods: Annotated[
        str | None,
        typer.Argument(
            help="Ways to prune, comma-separated, as in `atedm evaluate`; by default the paper's and ours, with "
            "kept sets that move and that stay.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    prompts: PromptsOption = "scenes",
    captions: Annotated[
        int | None,
        typer.Option(
            help="How many, from the first; by default 50, or all that a file holds if fewer.", rich_help_panel="Images"
        ),
    ] = None,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, every block and step.", rich_help_panel="Output")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a chart into this PNG.", rich_help_panel="Output")
    ] = None,
) -> None:
    """Prune beside dense runs, and see where it errs and whether the errors of a run cancel or add up.

    A block's error is that of what it adds to the same features; a step's that of the guided prediction; and the image
    is moved by the sum of all steps' errors, each times its step in sigma.

    `atedm errors "paper,matched" --captions 20 --plot out/errors.png`
    """
    from json import dumps

    from rich.console import Console

    from atedm.evaluation.errors import find_errors
    from atedm.evaluation.methods import Pruning
    from atedm.evaluation.methods_by_name import method_by_name, parse_methods
    from atedm.evaluation.prompts import read_prompts
    from atedm.files import check_writable, save_image
    from atedm.pictures.errors_chart import errors_chart
    from atedm.pipelines import habits

    check_writable(plot)
    configs = {}
    asked = METHODS if methods is None else {spec: spec for spec in parse_methods(methods)}
    for name, spec in asked.items():
        method = method_by_name(spec, model, steps=steps)
        if not isinstance(method, Pruning):
            raise ValueError(f"errors are looked for where tokens are pruned, not with {spec!r}")
        configs[name] = method.config
    texts = [prompt.text for prompt in read_prompts(prompts, captions, seed, at_most=50)]
    console = Console(stderr=True)
    pipe = opened_alone(model, device, dtype, console)
    with rounds_shown(console, -(-len(texts) // batch)) as on_step:
        report = find_errors(
            pipe,
            texts,
            configs,
            steps=steps,
            guidance=habits(model).guidance if guidance is None else guidance,
            seed=seed,
            batch=batch,
            progress=on_step,
        )
    if plot is not None:
        save_image(errors_chart(report, f"{len(texts)} images, {steps} steps"), plot)
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    for line in _table(report):
        typer.echo(line)
    if plot is not None:
        typer.echo(str(plot))


def _table(report: ErrorsReport) -> list[str]:
    levels = sorted(set(report.levels.values()))
    head = ["method", *(f"block, level {level}" for level in levels), "step", "one step and the next"]
    head += ["image moved", "if independent"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in report.methods:
        step = (sum(value * value for value in method.steps) / len(method.steps)) ** 0.5
        cells = [f"{report.of_level(method, level):.3f}" for level in levels]
        cells += [f"{step:.4f}", f"{method.successive:.2f}"]
        cells += [f"{method.moved[-1]:.4f}", f"{method.moved_if_independent[-1]:.4f}"]
        lines.append("| " + " | ".join([method.name, *cells]) + " |")
    return lines
