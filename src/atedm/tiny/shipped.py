"""Open a model that ships."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from atedm.tiny import SHIPPED, weights_folder
from atedm.tiny.few_steps import LORA, with_few_steps
from atedm.tiny.transformer import CaptionOnlySD3Pipeline


def open_shipped(name: str, dtype: torch.dtype) -> Any:
    """Open the pipeline of one of `SHIPPED` on the CPU.

    Raises:
        FileNotFoundError: If this installation carries no weights.
    """
    folder, few_steps = weights_folder(name), SHIPPED[name].few_steps
    kind = CaptionOnlySD3Pipeline if (folder / "transformer").exists() else StableDiffusionXLPipeline
    # Few steps in float32 first, so that the LoRA is added without rounding.
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32 if few_steps else dtype)
    if few_steps:
        with_few_steps(pipe, folder / LORA)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype)  # diffusers' own warns of float32 layers, of which there are none
    return pipe
