"""The few-step sibling of a trained model: a LoRA on the same weights, and the sampler that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, SchedulerMixin
from safetensors.torch import load_file
from torch import Tensor

from atedm.tiny.transformer import build_flow_scheduler
from atedm.tiny.unet import build_scheduler

LORA = "lora"
"""Folder of the LoRA, in that of a run and in that which ships."""
TEACHER_STEPS = 20
"""Times that the path of the teacher is cut into; a step of it leads from one to the next."""
_FILE = "pytorch_lora_weights.safetensors"


def build_few_step_scheduler(transformer: bool = False) -> SchedulerMixin:
    """Build the sampler of a distilled model: of a transformer Euler's, as FLUX.1 schnell and SD 3.5 Turbo have."""
    if transformer:
        return build_flow_scheduler()
    config = {**build_scheduler().config, "original_inference_steps": TEACHER_STEPS, "timestep_spacing": "leading"}
    return LCMScheduler.from_config(config)


def with_few_steps(pipe: Any, lora: Path) -> Any:
    """Make a pipeline its few-step sibling, in place: the LoRA is added to the weights for good.

    peft would do the same, and is not needed: a LoRA of rank r whose alpha is r adds the product of its two matrices.

    Args:
        pipe: Pipeline of the model that was distilled.
        lora: Folder of the LoRA.

    Raises:
        FileNotFoundError: If there is no LoRA in the folder.
    """
    file = lora / _FILE
    if not file.exists():
        raise FileNotFoundError(f"there is no LoRA for few steps at {file}")
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    _fuse(getattr(pipe, part), load_file(file), f"{part}.")
    pipe.scheduler = build_few_step_scheduler(transformer=part == "transformer")
    return pipe


@torch.no_grad()
def _fuse(model: torch.nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    down, up = ".lora_A.weight", ".lora_B.weight"
    for name in tensors:
        if name.endswith(down):
            layer = name.removesuffix(down)
            weight = model.get_parameter(f"{layer.removeprefix(prefix)}.weight")
            added = tensors[layer + up].float() @ tensors[name].float()
            weight.copy_(weight.float() + added.reshape(weight.shape))
