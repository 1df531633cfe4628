"""`atedm tune`: find the plan that a model bears at a budget."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import options, running

SEARCH = options.panel("Search")
BudgetOf = Enum("BudgetOf", {"time": "time", "arithmetic": "arithmetic"})


def tune(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)] = "tiny",
    budget: Annotated[float, SEARCH("What a run may take, as a share of the dense run.")] = 0.5,
    of: Annotated[
        BudgetOf, SEARCH("**time** on this device, measured at the start; or **arithmetic**, the same everywhere.")
    ] = BudgetOf.time,
    images: Annotated[float, SEARCH("What the search may take, in dense images.")] = 100.0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompts: options.OwnPrompts = None,
    captions: options.Captions = 8,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    out: options.Folder = Path("out/tune"),
) -> None:
    """Find the steps, scheduler, pruning and cache whose images are nearest to dense ones at a budget.

    It draws a few prompts dense, then by each single technique at the budget, then by combinations that an optimiser
    proposes, and writes `plan.json` and a page, `plan.html`. Ctrl+C ends it with the best so far. The same command goes
    on where it was stopped.

    Examples:
    `atedm tune tiny --budget 0.5 --steps 20`

    `atedm tune ./my-checkpoint.safetensors --budget 0.4 --prompts my-prompts.txt`

    `atedm generate "a fox in snow" --model ./my-checkpoint.safetensors --plan out/tune/plan.json --compare`
    """
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.extra import optional
    from atedm.tuning.prompts import tuning_prompts
    from atedm.tuning.tune import tune as search

    optional("optuna", "tune")
    read = [] if prompts is None else read_prompts(str(prompts), at_most=captions)
    texts = [prompt.text for prompt in read] or tuning_prompts(model, captions)
    pipe = running.open_pipeline(model, device, dtype)
    with running.progress_bar() as tell:
        tuned = search(
            pipe,
            budget,
            of=of.value,
            prompts=texts,
            steps=steps,
            guidance=guidance,
            size=options.pixels(size),
            images=images,
            seed=seed,
            model=model,
            out=out,
            progress=tell,
        )
    found = tuned.plan.found
    for one in [one for one in tuned.tried if one.is_whole][:5]:
        typer.echo(f"{one.distance:6.2f} dB at {one.share:.3f} of the dense {found['of']}  {one.plan.what()}")
    if tuned.was_stopped:
        typer.echo("stopped; this is the best so far, and the same command goes on")
    typer.echo(f"{tuned.file}: {tuned.plan.what()}")
    typer.echo(str(tuned.page))
