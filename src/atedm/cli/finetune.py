"""`atedm finetune`: a LoRA that wins back what a plan's pruning lost."""

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli import options, running

TRAINING = options.panel("Training")


def finetune(
    model: Annotated[str, typer.Argument(help="The model that the plan is for, as `atedm tune` takes it.")] = "tiny",
    plan: Annotated[Path, options.PLAIN("A plan.json.")] = Path("out/tune/plan.json"),
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompts: options.OwnPrompts = None,
    runs: Annotated[int, TRAINING("Dense runs to learn from, one prompt each.", callback=options.at_least_one)] = 500,
    rank: Annotated[int, TRAINING("Of the LoRA.", callback=options.at_least_one)] = 16,
    learning_rate: Annotated[float, TRAINING("At its highest.")] = 3e-4,
    checkpointing: Annotated[bool, TRAINING("Take less memory and a third more time.", "--checkpointing")] = False,
    seed: options.Seed = 0,
    memory: Annotated[
        bool, options.PLAIN("Only print what training MODEL takes, also **sdxl**; needs no weights.", "--memory")
    ] = False,
    out: options.Folder = Path("out/finetune"),
) -> None:
    """Train a LoRA by which the pruned model predicts what its own dense self predicts.

    It needs no data but prompts: the model draws them dense and learns from that, one run at a time. It writes `lora/`
    in diffusers' format and a `plan.json` that names it. The same command goes on where it was stopped. GPUs and
    machines share the work by `accelerate launch -m atedm finetune ...`.

    Examples:
    `atedm finetune tiny --plan out/tune/plan.json`

    `atedm finetune sdxl --memory --dtype bfloat16 --checkpointing`

    `atedm evaluate "dense,out/tune/plan.json,out/finetune/plan.json"`
    """
    import torch

    from atedm.costs.architectures import architecture
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.evaluation.sharing import shared_work
    from atedm.lab.extra import optional
    from atedm.plans.plan import read_plan
    from atedm.tuning.finetune import Training
    from atedm.tuning.finetune import finetune as train
    from atedm.tuning.memory import training_needs
    from atedm.tuning.prompts import tuning_prompts

    optional("peft", "tune")
    training = Training(runs, rank, learning_rate, seed, checkpointing)
    if memory:
        arch = architecture(model)
        needs = training_needs(arch, training, torch.float32 if dtype is None else getattr(torch, dtype.value))
        parts = (needs.weights, needs.lora, needs.activations, needs.total)
        weights, lora, activations, all_parts = (f"{part / 1e9:.2f} GB" for part in parts)
        typer.echo(
            f"{model} at {' x '.join(map(str, arch.default_size))}: {all_parts}, of which the model {weights}, LoRA of "
            f"rank {rank} with its optimiser {lora}, activations {activations} if no token were dropped"
        )
        return
    found = read_plan(plan)
    texts = [one.text for one in read_prompts(str(prompts))] if prompts is not None else tuning_prompts(model, runs)
    state = shared_work(device)
    pipe = running.open_pipeline(model, device or str(state.device), dtype)
    with running.progress_bar(quiet=not state.is_main_process) as tell:
        trained = train(pipe, found, texts, training, out, state=state, progress=tell)
    if state.is_main_process:
        tenth = max(1, len(trained.losses) // 10)
        first, last = (sum(part) / tenth for part in (trained.losses[:tenth], trained.losses[-tenth:]))
        typer.echo(f"error of a step, share of the output's square: {first:.2e} at first, {last:.2e} at the end")
        typer.echo(str(trained.file))
