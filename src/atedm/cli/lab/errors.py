"""`atedm lab errors`: where pruning errs, block by block, and how the errors of a run add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, ModelOption

if TYPE_CHECKING:
    from atedm.lab.probes.errors import ErrorsReport

METHODS = {
    "AT-EDM": "paper",
    "AT-EDM, kept at random": "paper[rank=uniform-random]",
    "matched by a lattice": "matched[own_update_share=0,rank=lattice]",
    "matched by a lattice that stays": "matched[own_update_share=0,rank=lattice,refresh_every=1000]",
    "matched, no own update": "matched[own_update_share=0]",
    "matched": "matched",
}
"""The paper's, a control, and ours: with a kept set that moves and one that stays, and as it is."""


def errors(
    methods: Annotated[
        str | None,
        typer.Argument(
            help="Ways to prune, split by commas, as in `atedm evaluate`; by default the paper's and ours, with kept "
            "sets that move and that stay.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    prompts: Annotated[
        str, typer.Option(help="**scenes**, a .txt or .csv file, or a folder of MS-COCO.", rich_help_panel="Images")
    ] = "scenes",
    captions: shared.CaptionsOption = 50,
    steps: shared.StepsOption = 20,
    guidance: shared.GuidanceOption = None,
    seed: shared.SeedOption = 0,
    batch: shared.BatchOption = 10,
    json: shared.JsonOption = False,
    plot: shared.PlotOption = None,
) -> None:
    """Prune beside dense runs, and see where it errs and whether the errors of a run cancel or add up.

    A block's error is that of what it adds to the same features; a step's that of the guided prediction; and the image
    is moved by the sum of all steps' errors, each times its step in sigma.
    """
    from atedm.files import check_writable
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.methods.by_name import parse_methods
    from atedm.lab.probes.errors import find_errors

    check_writable(plot)
    asked = METHODS if methods is None else {spec: spec for spec in parse_methods(methods)}
    chosen = {name: shared.method_of(spec, model, steps) for name, spec in asked.items()}
    texts = [prompt.text for prompt in read_prompts(prompts, None, seed, at_most=captions)]
    pipe = shared.open_pipeline(model, device, dtype)
    with shared.progress_bar() as tell:
        report = find_errors(pipe, texts, chosen, shared.drawing_of(model, steps, guidance, seed, batch), progress=tell)
    title = f"{len(texts)} images, {steps} steps"
    shared.show(report.as_dict(), table(report), json, plot, "errors", report, title)


def table(report: ErrorsReport) -> str:
    """Show a line a method."""
    from atedm.lab.probes.errors import root_mean_square
    from atedm.lab.tables import markdown_table

    levels = sorted(set(report.levels.values()))
    head = ["method", *(f"block, level {level}" for level in levels), "step", "one step and the next"]
    rows = []
    for one in report.methods:
        blocks = (f"{report.of_level(one, level):.3f}" for level in levels)
        moved = (f"{one.moved[-1]:.4f}", f"{one.moved_if_independent[-1]:.4f}")
        rows.append([one.name, *blocks, f"{root_mean_square(one.steps):.4f}", f"{one.successive:.2f}", *moved])
    return markdown_table([*head, "image moved", "if independent"], rows)
