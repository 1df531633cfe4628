"""The two models that are trained on the scenes, by what denoises in their pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CLIPTokenizer

from atedm.tiny.denoiser import Denoiser
from atedm.tiny.noise_paths import FlowPath, NoisePath, VPath
from atedm.tiny.text import build_text_encoders
from atedm.tiny.transformer import SHIFT, FlowDenoiser, build_flow_scheduler, build_transformer
from atedm.tiny.unet import build_scheduler, build_unet

UNET, TRANSFORMER = "unet", "transformer"


class Untrained(NamedTuple):
    """A model to train, and what goes with it."""

    model: nn.Module
    path: NoisePath
    #: Its sampler.
    scheduler: Any


def build_model(
    part: str, tokenizer: CLIPTokenizer, device: torch.device, *, compiled: bool, teacher_widths: Sequence[int] = ()
) -> Untrained:
    """Build the model whose pipeline has a `UNET` or a `TRANSFORMER`, on a device.

    A transformer that learns from a teacher has ``teacher_widths``, those of its features.
    """
    encoders = build_text_encoders(tokenizer)
    if part == TRANSFORMER:
        model = FlowDenoiser(encoders, build_transformer(), tokenizer, compiled, teacher_widths).to(device)
        return Untrained(model, FlowPath(device, SHIFT), build_flow_scheduler())
    return Untrained(Denoiser(encoders, build_unet(), compiled).to(device), VPath(device), build_scheduler())
