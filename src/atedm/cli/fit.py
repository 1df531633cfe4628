"""`atedm fit`: a refill fitted to a plan on the model's own runs."""

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import options, running


def fit(
    model: Annotated[str, typer.Argument(help="The model that the plan is for, as `atedm tune` takes it.")] = "tiny",
    plan: Annotated[Path, options.PLAIN("A plan.json of matched pruning.")] = Path("out/tune/plan.json"),
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompts: options.OwnPrompts = None,
    count: Annotated[
        int, options.PLAIN("How many prompts to draw; a quarter of them judges.", callback=options.at_least_one)
    ] = 96,
    seed: options.Seed = 0,
    out: options.Folder = Path("out/fit"),
) -> None:
    """Fit what a plan's refill gets wrong, by least squares on the model's own runs.

    It needs no data but prompts and takes no gradients. Steps are fitted one after another, and kept where they bring
    images of other prompts nearer to dense. It writes `fit.safetensors` and a `plan.json` that names it. The same
    command goes on where it was stopped.

    Examples:
    `atedm fit tiny-sd3-turbo --plan docs/plans/tiny-sd3-turbo-to-fit-0.6.json`

    `atedm generate "a penguin left of a rose" --model tiny-sd3-turbo --plan out/fit/plan.json`
    """
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.plans.plan import read_plan
    from atedm.tuning.fit import fit as fit_plan
    from atedm.tuning.prompts import tuning_prompts

    found = read_plan(plan)
    texts = [one.text for one in read_prompts(str(prompts))] if prompts is not None else tuning_prompts(model, count)
    pipe = running.open_pipeline(model, device, dtype)
    with running.progress_bar() as tell:
        fitted = fit_plan(pipe, found, texts[:count], out, seed=seed, progress=tell)
    typer.echo(f"as it is: {fitted.before:.2f} dB from dense")
    for step, distance in fitted.distances.items():
        verdict = "kept" if step in fitted.steps else "not kept"
        typer.echo(f"with step {step + 1} fitted: {distance:.2f} dB, {verdict}")
    typer.echo(str(fitted.file))
