"""`atedm generate`: make images, dense and pruned side by side if asked."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from atedm.cli import options, running

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
    model: options.Model = "tiny",
    device: options.Device = None,
    method: options.Method = None,
    rate: options.Rate = None,
    budget: options.Budget = None,
    plan: Annotated[
        Path | None, options.PRUNING("A plan.json of `atedm tune`: it sets the steps, the method and the rest.")
    ] = None,
    protect: Annotated[Path | None, options.PRUNING("A picture, white where no token is dropped.")] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    seed: Annotated[int, options.IMAGES("Seed of the first image; each next has one more.")] = 0,
    again: Annotated[Path | None, options.IMAGES("A run.json: make the images of that run again.")] = None,
    compare: Annotated[
        bool, options.OUTPUT("Also make each image dense and by another method, and a sheet of all.", "--compare")
    ] = False,
    compare_with: Annotated[
        options.MethodName | None,
        options.OUTPUT(
            "Turns --compare on and names the other method, which is shown at the same cost if it gets there. "
            "By default paper beside matched, and matched beside others."
        ),
    ] = None,
    maps: Annotated[bool, options.OUTPUT("Draw importance and kept tokens per block and step.", "--maps")] = False,
    out: Annotated[Path, options.OUTPUT("Folder for the results.")] = Path("out"),
) -> None:
    """Make images with tokens pruned.

    Examples:
    `atedm generate --compare` makes a set of scenes with the model that ships, dense and pruned.

    `atedm generate "a butterfly above a rose" --rate 0.5 --maps`

    `atedm generate --budget 0.9 --compare` prunes until a run costs 90 % of the dense one.

    `atedm generate "a fox in snow" --model stabilityai/stable-diffusion-xl-base-1.0 --compare`

    `atedm generate "a rose" --plan out/tune/plan.json --compare` makes images by a plan that `atedm tune` found.

    `atedm generate --again out/run.json --out out/again` makes the images of a run again.
    """
    from atedm.app.equal_cost import has_transformer, method_at, with_other_method, within_budget
    from atedm.app.generate import generate as make
    from atedm.app.request import Request
    from atedm.app.run_file import read_run_file
    from atedm.plans.plan import read_plan
    from atedm.suits import suits

    options.refuse_rate_and_budget(rate, budget)
    if plan is not None and (given := [name for name in _given(context, but=()) if name in _OF_A_PLAN]):
        raise ValueError(f"the plan says what they would say: leave out {', '.join(given)}")
    usual = suits(model)
    name = usual.method if method is None else method.value
    if again is None:
        found = None if plan is None else read_plan(plan)
        width, height = options.pixels(size) or (found and found.size) or (None, None)
        scales = (guidance, found and found.guidance, usual.guidance)
        others: dict[str, Any] = {"width": width, "height": height, "seed": seed, "protect": protect and str(protect)}
        others["guidance"] = next(scale for scale in scales if scale is not None)
        texts = tuple(prompts or usual.prompts)
        if found is None:
            request = Request(texts, method_at(name, rate), usual.steps if steps is None else steps, **others)
        else:
            request = Request.by_plan(texts, found, **others)
    elif given := _given(context, but=_WITH_AGAIN):
        raise ValueError(f"--again makes a run again as it was; leave out {', '.join(given)}")
    else:
        model, request = read_run_file(again)
    compare = compare or compare_with is not None
    pipe = running.open_pipeline(model, device)
    with running.status("counting"):
        if again is None and has_transformer(pipe):
            request = replace(request, method=method_at(name, rate, transformer=True))
        if budget is not None:
            request = within_budget(pipe, request, budget)
        if compare and (compare_with is not None or (request.other is None and request.plan is None)):
            request = with_other_method(pipe, request, compare_with and compare_with.value)
    done = 0
    total = request.steps * len(request.prompts) * (1 + compare + (compare and request.other is not None))
    with running.progress_bar() as tell:

        def on_step(what: str, step: int, steps: int) -> None:
            nonlocal done
            tell(what, done + step, total)
            done += steps if step == steps else 0

        results = make(pipe, request, out, compare=compare, maps=maps, model=model, progress=on_step)
        tell("images", total, total)
    for image in chain(*((result, result.other) for result in results)):
        if image is not None:
            line = f"{out / image.file}  seed {image.seed}  kept {image.kept_share:.1%}  {image.seconds:.2f} s"
            dense = f"  (dense {image.dense_seconds:.2f} s, {image.psnr_to_dense:.1f} dB from it)" if compare else ""
            typer.echo(line + dense)
    typer.echo(str(out / ("comparison.png" if compare else "run.json")))


def _given(context: typer.Context, but: tuple[str, ...]) -> list[str]:
    """Return the options that were given, whatever their value."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in but
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]
