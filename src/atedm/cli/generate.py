"""`atedm generate`: make images, dense and pruned side by side if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.options import (
    BudgetOption,
    DeviceOption,
    MethodName,
    MethodNameOption,
    ModelOption,
    OutOption,
    PlanOption,
    RateOption,
    SizeOption,
    StepsOption,
    checked_guidance,
    pixels,
    refuse_rate_and_budget,
)

if TYPE_CHECKING:
    from atedm.app.request import ImageResult, Request

_WITH_AGAIN = ("again", "out", "device", "compare", "compare_with", "maps")
"""What may be given with ``--again``, because it is not of the run itself."""
_OF_A_PLAN = ("--method", "--rate", "--budget", "--steps")
"""What a plan says itself."""


def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One image each. By default prompts that suit the model.", show_default=False),
    ] = None,
    model: ModelOption = "tiny",
    device: DeviceOption = None,
    method: MethodNameOption = None,
    rate: RateOption = None,
    budget: BudgetOption = None,
    plan: PlanOption = None,
    protect: Annotated[
        Path | None, typer.Option(help="A picture, white where no token is dropped.", rich_help_panel="Pruning")
    ] = None,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale; by default what suits the model.", rich_help_panel="Image", callback=checked_guidance
        ),
    ] = None,
    size: SizeOption = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; each next has one more.", rich_help_panel="Image")
    ] = 0,
    again: Annotated[
        Path | None, typer.Option(help="A run.json: make the images of that run again.", rich_help_panel="Image")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also make each image dense and by another method, and one sheet to compare.",
            rich_help_panel="Output",
        ),
    ] = False,
    compare_with: Annotated[
        MethodName | None,
        typer.Option(
            help="Turns --compare on and names the other method, which is shown at the same cost if it gets there. "
            "By default paper beside matched, and matched beside others.",
            rich_help_panel="Output",
        ),
    ] = None,
    maps: Annotated[
        bool,
        typer.Option("--maps", help="Draw importance and kept tokens per block and step.", rich_help_panel="Output"),
    ] = False,
    out: OutOption = Path("out"),
) -> None:
    """Make images with tokens pruned.

    Examples:
    `atedm generate --compare` makes a set of scenes with the model that ships, dense and pruned.

    `atedm generate "a red circle above a blue square" --rate 0.5 --maps`

    `atedm generate --budget 0.9 --compare` prunes until a run costs 90 % of the dense one.

    `atedm generate "a fox in snow" --model stabilityai/stable-diffusion-xl-base-1.0 --compare`

    `atedm generate "a red ring" --plan out/tune/plan.json --compare` makes images by a plan that `atedm tune` found.

    `atedm generate --again out/run.json --out out/again` makes the images of a run again.
    """
    from rich.console import Console
    from rich.markup import escape

    from atedm.app.equal_cost import has_transformer, method_at, with_other_method, within_budget
    from atedm.app.models import load_pipeline, quiet_libraries
    from atedm.app.request import Request
    from atedm.app.run_file import read_run_file
    from atedm.plans.plan import read_plan
    from atedm.suits import suits

    refuse_rate_and_budget(rate, budget)
    if plan is not None and (given := [name for name in _given(context, but=()) if name in _OF_A_PLAN]):
        raise ValueError(f"the plan says what they would say: leave out {', '.join(given)}")
    if again is None and plan is not None:
        found = read_plan(plan)
        suiting = suits(model)
        width, height = pixels(size) or found.size or (None, None)
        scale = found.guidance if guidance is None else guidance
        request = Request.by_plan(
            tuple(prompts or suiting.prompts),
            found,
            guidance=suiting.guidance if scale is None else scale,
            width=width,
            height=height,
            seed=seed,
            protect=None if protect is None else str(protect),
        )
    elif again is None:
        suiting = suits(model)
        width, height = pixels(size) or (None, None)
        request = Request(
            prompts=tuple(prompts or suiting.prompts),
            method=method_at(suiting.method if method is None else method.value, rate),
            steps=suiting.steps if steps is None else steps,
            guidance=suiting.guidance if guidance is None else guidance,
            width=width,
            height=height,
            seed=seed,
            protect=None if protect is None else str(protect),
        )
    elif given := _given(context, but=_WITH_AGAIN):
        raise ValueError(f"--again makes a run again as it was; leave out {', '.join(given)}")
    else:
        model, request = read_run_file(again)
    compare = compare or compare_with is not None
    quiet_libraries()
    with Console(stderr=True).status(f"opening {escape(model)}"):
        pipe = load_pipeline(model, device=device)
        if again is None and has_transformer(pipe):
            name = suits(model).method if method is None else method.value
            request = replace(request, method=method_at(name, rate, transformer=True))
        if budget is not None:
            request = within_budget(pipe, request, budget)
        if compare and (compare_with is not None or (request.other is None and request.plan is None)):
            request = with_other_method(pipe, request, compare_with and compare_with.value)
    results = _make_with_progress(pipe, request, out, compare, maps, model)
    for image in results:
        typer.echo(_line(out, image))
        if image.other is not None:
            typer.echo(_line(out, image.other))
    typer.echo(str(out / ("comparison.png" if compare else "run.json")))


def _make_with_progress(
    pipe: Any, request: Request, out: Path, compare: bool, maps: bool, model: str
) -> list[ImageResult]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from atedm.app.generate import generate as make

    images = len(request.prompts) * (1 + compare + (compare and request.other is not None))
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("images", total=images * request.steps)
        done = 0

        def on_step(what: str, step: int, steps: int) -> None:
            nonlocal done
            bar.update(task, description=escape(what), completed=done + step)
            done += steps if step == steps else 0

        results = make(pipe, request, out, compare=compare, maps=maps, model=model, progress=on_step)
        bar.update(task, completed=images * request.steps, description="images")
    return results


def _line(out: Path, image: ImageResult) -> str:
    line = f"{out / image.file}  seed {image.seed}  kept {image.kept_share:.1%}  {image.seconds:.2f} s"
    if image.psnr_to_dense is None:
        return line
    return f"{line}  (dense {image.dense_seconds:.2f} s, {image.psnr_to_dense:.1f} dB from it)"


def _given(context: typer.Context, but: tuple[str, ...]) -> list[str]:
    """Return the options that were given, whatever their value."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in but
        and parameter.name is not None
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
