"""`atedm.finetune`: a LoRA by which a pruned model predicts what its own dense self predicts.

No data but prompts. For every prompt the model draws dense, and what the U-Net or transformer was given and gave in
each step is written down. Then the pruned model with the LoRA runs over the same inputs in the same order, so that what
a method remembers from step to step is there as it will be, and learns to give the same. The paper names this as future
work (supplement F).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from atedm.files import written_whole
from atedm.hosts.diffusers_dit import known_family
from atedm.hosts.models import find_model, is_transformer
from atedm.lab.evaluation.sharing import shared_work
from atedm.lab.extra import optional
from atedm.patch import is_applied, pruned
from atedm.plans.applied import part_of
from atedm.plans.fingerprint import checksum, refuse_other_model
from atedm.plans.plan import Plan, save_plan
from atedm.plans.schedulers import scheduled
from atedm.tiny.checkpoint import load_moments, moments_of
from atedm.tuning.claim import claim
from atedm.tuning.drawing import call_of
from atedm.words import check_whole, is_number

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
"""Linear layers of the attention blocks of a U-Net."""
PLAN, LORA, STATE, SETTINGS = "plan.json", "lora", "state.safetensors", "training.json"
_JITTER = 0.3
"""How far the keep ratio is drawn around the plan's: up to this factor's exponential, either way."""
_SAVED_EVERY = 10
"""Runs after which there is a new state to go on from."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Training:
    """How a LoRA is trained.

    Raises:
        ValueError: If a value is out of its range.
    """

    #: Dense runs, each with a prompt and noise of its own, after each of which the weights change once.
    runs: int = 500
    rank: int = 16
    #: At its highest; it rises over the first twentieth of the runs and falls to zero by a cosine.
    learning_rate: float = 3e-4
    seed: int = 0
    #: Whether layers are run again for their gradients and not kept, which takes a third more time. For U-Nets.
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        for name, least in (("runs", 1), ("rank", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        if not is_number(self.learning_rate) or not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0 and at most 1, not {self.learning_rate!r}")

    def check_for(self, model: nn.Module) -> None:
        """Raise a `ValueError` if a model cannot be trained so."""
        if self.checkpointing and is_transformer(model):
            raise ValueError(
                "a pruned transformer cannot run blocks again on their own; train it without checkpointing"
            )

    def adapter(self, model: nn.Module) -> Any:
        """Return what peft is told of the LoRA of a model."""
        peft = optional("peft", "tune")
        return peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets(model))

    def rate_at(self, run: int) -> float:
        """Return the learning rate of a run, counted from 0."""
        warm = min(1.0, (run + 1) / max(1.0, self.runs / 20))
        return self.learning_rate * warm * (1 + math.cos(math.pi * run / self.runs)) / 2


def targets(model: nn.Module) -> list[str]:
    """Name the linear layers that a LoRA changes: of a transformer all of its blocks but those that modulate."""
    if not is_transformer(model):
        return list(TARGETS)
    return [
        f"{blocks}.{name}"
        for blocks in known_family(model).kinds
        for name, layer in model.get_submodule(blocks).named_modules()
        if isinstance(layer, nn.Linear) and "norm" not in name
    ]


@dataclass(frozen=True)
class Finetuned:
    """What training gave."""

    #: The plan, which names the LoRA.
    plan: Plan
    file: Path
    #: Of each run, the squared error of the model's output as a share of the output's own square.
    losses: tuple[float, ...]


def finetune(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    training: Training = Training(),
    out: Path | str = Path("out/finetune"),
    *,
    state: PartialState | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Finetuned:
    """Train a LoRA for a plan, and write it in diffusers' format with a plan that names it.

    The same call goes on where it was stopped or killed, to the same result. Processes share the runs where
    `accelerate` started several.

    Args:
        pipe: The pipeline that the plan is for, as it is. Left as it was.
        plan: Of a method that prunes.
        prompts: What to draw; the runs go through them in turns.
        training: How.
        out: Folder for ``lora/`` and ``plan.json``.
        state: Of `accelerate`; None is `shared_work`.
        progress: Told after every run.

    Raises:
        ImportError: If the extra ``tune`` is not installed.
        TypeError: If there is nothing that can be pruned.
        ValueError: If the plan is for another model or prunes nothing, the pipeline is patched or has LoRAs, there are
            no prompts, a transformer is to be checkpointed, or ``out`` holds a training of something else.
    """
    optional("peft", "tune")
    model, out = find_model(pipe), Path(out)
    if is_applied(pipe):
        raise ValueError("this pipeline is patched, and training begins with dense runs; call atedm.remove first")
    if getattr(model, "peft_config", None):
        raise ValueError("this pipeline has LoRAs of its own; call pipe.unload_lora_weights() first")
    training.check_for(model)
    refuse_other_model(plan.model, pipe)
    if plan.method is None:
        raise ValueError("this plan prunes nothing, so there is nothing that training could win back")
    if plan.fit is not None:
        raise ValueError("this plan has a fit, which a LoRA would make wrong; train one for the plan without it")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("there are no prompts to draw, or one is empty")
    state = state or shared_work()
    weights = checksum(model)
    if state.is_main_process:
        asked = {"plan": plan.settings(), "training": dataclasses.asdict(training), "weights": weights}
        asked |= {"prompts": list(prompts), "processes": state.num_processes}
        claim(out / SETTINGS, asked, "a training of")
    with _trainable(model, training) as parameters, scheduled(pipe, plan.scheduler):
        optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        losses = _resumed(out / STATE, parameters, optimizer)
        progress("training", len(losses), training.runs)
        for run in range(len(losses), training.runs):
            for group in optimizer.param_groups:
                group["lr"] = training.rate_at(run)
            mine = run * state.num_processes + state.process_index
            loss = _one_run(pipe, model, plan, prompts[mine % len(prompts)], training.seed + mine)
            for parameter in parameters:
                if state.num_processes > 1:
                    parameter.grad = reduce(parameter.grad, "mean")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            if state.is_main_process and ((run + 1) % _SAVED_EVERY == 0 or run + 1 == training.runs):
                _save_state(out / STATE, parameters, optimizer, losses)
            recent = losses[-20:]
            progress(f"error {sum(recent) / len(recent):.2e}", run + 1, training.runs)
        if state.is_main_process:
            _save_lora(pipe, model, out / LORA)
    found = {**plan.found, "weights": weights, "lora": dataclasses.asdict(training) | {"prompts": len(prompts)}}
    trained = dataclasses.replace(plan, lora=LORA, folder=out, found=found)
    if state.is_main_process:
        save_plan(trained, out / PLAN)
    return Finetuned(trained, out / PLAN, tuple(losses))


def _one_run(pipe: Any, model: Any, plan: Plan, prompt: str, seed: int) -> float:
    """Draw dense, then sum up gradients of the pruned model over the same steps; return the mean relative error."""
    assert plan.method is not None
    full = set(plan.full_steps())
    model.disable_adapters()
    every = _dense_calls(pipe, model, plan, prompt, seed)
    each = max(1, len(every) // plan.steps)  # a transformer may be called once with the prompt and once without
    calls = [call for index, call in enumerate(every) if index // each in full]
    model.enable_adapters()
    draw = torch.Generator("cpu").manual_seed(seed)
    keep = (1 - plan.method.rate) * math.exp(_JITTER * (2 * float(torch.rand((), generator=draw)) - 1))
    method = dataclasses.replace(plan.method, rate=min(max(0.0, 1 - keep), 0.99))  # type: ignore[type-var]
    total = 0.0
    device = model.device.type
    mixed = nullcontext() if model.dtype == torch.float32 else torch.autocast(device, model.dtype)
    with pruned(pipe, method), torch.enable_grad(), mixed:
        for arguments, options, expected in calls:
            said = model(*arguments, **options)[0].float()
            error = functional.mse_loss(said, expected.float())
            loss = error / expected.float().square().mean()
            (loss / len(calls)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) / len(calls)
    return total


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]
"""What a model was given, by place and by name, and what it gave."""


def _dense_calls(pipe: Any, model: Any, plan: Plan, prompt: str, seed: int) -> list[Call]:
    calls: list[Call] = []

    def note(_: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        # Inputs are held as they are: by the tensor that holds a timestep a step is known.
        calls.append((arguments, options, output[0].detach().clone()))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        pipe(prompt, output_type="latent", **call_of(plan, seed))
    finally:
        hook.remove()
    return calls


@contextmanager
def _trainable(model: Any, training: Training) -> Iterator[list[nn.Parameter]]:
    """Add a LoRA whose weights are in float32, and take it off again; the model is exactly as before."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model.requires_grad_(False)
        model.add_adapter(training.adapter(model))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    model.eval()
    if training.checkpointing:
        model.train()  # diffusers checkpoints in training only; U-Nets have no dropout by default
        model.enable_gradient_checkpointing()
    try:
        yield parameters
    finally:
        if training.checkpointing:
            model.disable_gradient_checkpointing()
        model.unload_lora()
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _save_state(file: Path, parameters: list[nn.Parameter], optimizer: Any, losses: list[float]) -> None:
    tensors = {f"lora.{number}": one.data for number, one in enumerate(parameters)}
    tensors |= {"losses": torch.tensor(losses, dtype=torch.float64), **moments_of(optimizer, "optimizer")}
    with written_whole(file) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)


def _resumed(file: Path, parameters: list[nn.Parameter], optimizer: Any) -> list[float]:
    if not file.exists():
        return []
    try:
        tensors = load_file(file)
        for number, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"lora.{number}"])
        load_moments(optimizer, tensors, "optimizer")
        losses: list[float] = tensors["losses"].tolist()
        return losses
    except Exception as error:  # safetensors, torch and a wrong shape raise many kinds
        raise ValueError(f"{file} is no state of a training; remove it, and the training begins anew") from error


def _save_lora(pipe: Any, model: Any, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    layers = {name: one.contiguous() for name, one in get_peft_model_state_dict(model).items()}
    pipe.save_lora_weights(folder, **{f"{part_of(model)}_lora_layers": layers})
