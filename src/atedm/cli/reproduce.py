"""`atedm reproduce`: the paper's tables, curves and ablations, one word each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.evaluation_options import (
    IMAGES_PANEL,
    BatchOption,
    ClipModelOption,
    ClipWeightsOption,
    DtypeOption,
    FidFeaturesOption,
    FolderOption,
    GuidanceOption,
    MetricsOption,
    PromptsOption,
    SeedOption,
    SizeOption,
    opened,
    read_options,
)
from atedm.cli.options import DeviceOption, ModelOption

if TYPE_CHECKING:
    from PIL import Image

    from atedm.evaluation.evaluate import Result
    from atedm.evaluation.experiments import Experiment
    from atedm.evaluation.methods import Method
    from atedm.evaluation.reproduce import Outcome


def reproduce(
    experiment: Annotated[
        str,
        typer.Argument(
            help="**table1**, **curve**, **place**, **rankings**, **blocks**, **early**, **recovery**, "
            "**prune-less-steps**, **few-steps**, **stacking**, **questions**, **why**, **pareto**, **matched** or "
            "**reuse**."
        ),
    ],
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    prompts: PromptsOption = "scenes",
    captions: Annotated[
        int | None,
        typer.Option(
            help="How many, from the first; by default 1000, or all that a file holds if fewer.",
            rich_help_panel=IMAGES_PANEL,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps; by default 20, or what few-steps varies.", rich_help_panel=IMAGES_PANEL),
    ] = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    metrics: MetricsOption = "distance,accuracy,clip,fid",
    clip_model: ClipModelOption = None,
    clip_pretrained: ClipWeightsOption = "laion2b_s34b_b88k",
    fid_features: FidFeaturesOption = None,
    out: FolderOption = Path("out/reproduce"),
) -> None:
    """Run one of the paper's experiments: numbers, a plot and a sheet of images.

    Images are kept by setting and method, so experiments share them and a run that was stopped goes on. Work is shared
    among processes as with `atedm evaluate`.

    Examples:
    `atedm reproduce table1 --captions 100`

    `atedm reproduce recovery --model stabilityai/stable-diffusion-xl-base-1.0 --prompts COCO_FOLDER --steps 50`

    `atedm reproduce curve --guidance 7` runs one of the twelve scales, as curve-guidance-7; the whole curve finds its
    images.
    """
    from atedm.choices import check_name
    from atedm.evaluation.experiments import EXPERIMENTS, only_as_asked, results_name
    from atedm.evaluation.reproduce import markdown_of, sheet_of
    from atedm.evaluation.reproduce import reproduce as run
    from atedm.files import save_image, save_json, save_text
    from atedm.pipelines import quiet_libraries

    quiet_libraries()
    check_name("experiment", experiment, EXPERIMENTS)
    asked = read_options(
        model, dtype, prompts, captions, 20 if steps is None else steps, guidance, size, seed, batch, metrics,
        clip_model, clip_pretrained, fid_features, at_most=1000,
    )  # fmt: skip
    what = only_as_asked(EXPERIMENTS[experiment], steps, guidance)
    with opened(asked.drawing, device) as (pipe, drawing, state, tell):
        outcomes = run(what, pipe, asked.prompts, drawing, asked.metrics, out, state=state, progress=tell)
    if not state.is_main_process:
        return
    text = f"## {what.title} ({what.source})\n\n{markdown_of(what, outcomes)}\n"
    name = results_name(experiment, steps, guidance, asked.drawing.size, dtype)
    save_json([outcome.as_dict() for outcome in outcomes], out / f"{name}.json")
    save_text(text, out / f"{name}.md")
    chart = _chart(what, outcomes)
    if chart is None:
        (out / f"{name}.png").unlink(missing_ok=True)  # of other metrics, beside these figures
    else:
        save_image(chart, out / f"{name}.png")
    save_image(sheet_of(what, outcomes, asked.prompts), out / f"{name}-sheet.png")
    typer.echo(text)
    typer.echo(str(out / f"{name}.md"))


def _chart(experiment: Experiment, outcomes: list[Outcome]) -> Image.Image | None:
    """Draw FID against CLIP score where guidance varies, quality against cost where that does, else a row a method."""
    from atedm.pictures.quality_chart import cost_chart, curve_chart, rows_chart

    if experiment.guidance:
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for outcome in outcomes:
            for result in outcome.results:
                figures = result.scores.intervals()
                if "clip" in figures and "fid" in figures:
                    point = (outcome.drawing.guidance, figures["clip"].mean, figures["fid"].mean)
                    curves.setdefault(result.name, []).append(point)
        return curve_chart(curves, experiment.title) if curves else None
    if not experiment.joins_kinds:
        rows = {
            _row_name(experiment, outcome, result): {
                what: (result.scores.intervals()[name], factor)
                for name, what, factor in _FIGURES
                if name in result.scores.intervals()
            }
            for outcome in outcomes
            for result in outcome.results
        }
        return rows_chart(rows, experiment.title) if any(rows.values()) else None
    # Where good methods have every caption right, the distance still tells them apart.
    name, what, factor = next(
        (
            entry
            for entry in _FIGURES
            if all(entry[0] in result.scores.intervals() for result in outcomes[-1].results[1:])
        ),
        ("", "", 1.0),
    )
    points = {
        result.name: (result.cost, result.scores.intervals()[name])
        for result in outcomes[0].results
        if name in result.scores.intervals()
    }
    kinds = {result.name: _kind(result.method) for result in outcomes[0].results}
    return cost_chart(points, what, factor, experiment.title, kinds) if points else None


_FIGURES = (
    ("psnr", "distance to dense, dB", 1.0),
    ("accuracy", "captions right in everything, %", 100.0),
    ("clip", "CLIP score", 1.0),
)
"""What charts show, where it was asked for."""


def _row_name(experiment: Experiment, outcome: Outcome, result: Result) -> str:
    count = outcome.drawing.steps
    steps = f"{count} step{'s' * (count > 1)}, " if experiment.steps else ""
    return f"{steps}{result.name}, cost {result.cost:.2f}"


def _kind(method: Method) -> str:
    """What a chart of costs calls a method: those that differ in their cost alone are called the same."""
    from atedm.config import PRESETS
    from atedm.evaluation.methods import Caching, Dense, Merging, Pruning, Stacked

    if isinstance(method, Pruning):
        config, deep = method.config, PRESETS["matched-deep"]
        if config.replace(pruning_rate=deep.pruning_rate) == deep:
            return f"{config.method_name}, deep"
        return config.method_name + ("†" if config.where == "not-second-level" else "")
    if isinstance(method, Merging):
        return "ToMe, DSAP" if method.tome.prune_less_share > 0 else "ToMe"
    if isinstance(method, Stacked):
        return " + ".join(_kind(part) for part in method.methods)
    if isinstance(method, Caching):
        return "DeepCache"
    return "dense" if method == Dense() else "dense, fewer steps"
