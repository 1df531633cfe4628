"""`atedm finetune`: a LoRA that wins back what a plan's pruning lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption, at_least_one

if TYPE_CHECKING:
    from atedm.tuning.finetune import Training


def finetune(
    model: Annotated[str, typer.Argument(help="The model that the plan is for, as `atedm tune` takes it.")] = "tiny",
    plan: Annotated[Path, typer.Option(help="A plan.json.")] = Path("out/tune/plan.json"),
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file of a prompt a line, or a .csv file: a few hundred. By default a set of ours.",
            rich_help_panel="Training",
        ),
    ] = None,
    runs: Annotated[
        int,
        typer.Option(
            help="Dense runs to learn from, one prompt each.", rich_help_panel="Training", callback=at_least_one
        ),
    ] = 500,
    rank: Annotated[int, typer.Option(help="Of the LoRA.", rich_help_panel="Training", callback=at_least_one)] = 16,
    learning_rate: Annotated[float, typer.Option(help="At its highest.", rich_help_panel="Training")] = 1e-3,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Take less memory and a third more time.", rich_help_panel="Training"),
    ] = False,
    seed: shared.SeedOption = 0,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Print what training MODEL takes, also **sdxl** or **sd15**, and stop. Needs no weights."
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder; a training that was stopped goes on there.", rich_help_panel="Output")
    ] = Path("out/finetune"),
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
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.evaluation.sharing import shared_work
    from atedm.lab.extra import optional
    from atedm.plans.plan import read_plan
    from atedm.tuning.finetune import Training
    from atedm.tuning.finetune import finetune as train
    from atedm.tuning.prompts import tuning_prompts

    optional("peft", "tune")
    if memory:
        typer.echo(needs_of(model, Training(runs, rank, learning_rate, seed, checkpointing), dtype))
        return
    found = read_plan(plan)
    training = Training(runs, rank, learning_rate, seed, checkpointing)
    texts = [one.text for one in read_prompts(str(prompts))] if prompts is not None else tuning_prompts(model, runs)
    state = shared_work(device)
    pipe = shared.open_pipeline(model, device or str(state.device), dtype)
    with shared.progress_bar(quiet=not state.is_main_process) as tell:
        trained = train(pipe, found, texts, training, out, state=state, progress=tell)
    if state.is_main_process:
        tenth = max(1, len(trained.losses) // 10)
        first, last = (sum(part) / tenth for part in (trained.losses[:tenth], trained.losses[-tenth:]))
        typer.echo(f"error of a step, share of the output's square: {first:.2e} at first, {last:.2e} at the end")
        typer.echo(str(trained.file))


def needs_of(model: str, training: Training, dtype: shared.Dtype | None) -> str:
    """Say in a line what training a model takes."""
    import torch

    from atedm.costs.architectures import architecture
    from atedm.tuning.memory import training_needs

    precision = torch.float32 if dtype is None else getattr(torch, dtype.value)
    arch = architecture(model)
    needs = training_needs(arch, training, precision)
    parts = (needs.weights, needs.lora, needs.activations, needs.total)
    weights, lora, activations, total = (f"{part / 1e9:.2f} GB" for part in parts)
    width, height = arch.default_size
    return (
        f"{model} at {width} x {height}: {total}, of which U-Net {weights}, LoRA of rank {training.rank} with its "
        f"optimiser {lora}, activations {activations} if no token were dropped"
    )
