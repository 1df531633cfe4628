"""A sheet of samples, to look at while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import nn

from atedm.files import save_image
from atedm.tiny.autoencoder import FACTOR
from atedm.tiny.data import tokenize
from atedm.tiny.denoiser import whole_picture
from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import held_out_scenes

GUIDANCE = 3.0


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    scheduler: Any,
    autoencoder: AutoencoderTiny,
    tokenizer: Any,
    canvas: int,
    file: Path,
    *,
    count: int = 16,
    steps: int = 16,
    names: Sequence[str] = tuple(OBJECTS),
) -> None:
    """Draw held-out scenes with a denoiser, four a row, and write their captions beside the picture.

    Args:
        model: A `Denoiser` or a `FlowDenoiser`.
        scheduler: Its sampler.
        autoencoder: On the same device.
        tokenizer: Of the captions.
        canvas: Pixels a side.
        file: Where to.
        count: How many scenes.
        steps: Denoising steps.
        names: Of the objects to choose from.
    """
    device = next(model.parameters()).device
    captions = [scene.caption for scene in held_out_scenes(count, names=names)]
    ids = tokenize(tokenizer, captions).to(device).repeat(2, 1)
    keep = torch.cat([torch.zeros(count), torch.ones(count)]).to(device)
    scheduler.set_timesteps(steps, device=device)
    side = canvas // FACTOR
    sizes = whole_picture(canvas, 2 * count, device)
    noise = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    scale = getattr(scheduler, "scale_model_input", lambda noisy, _: noisy)  # a flow's has none
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        both = scale(latents.repeat(2, 1, 1, 1), timestep)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(both, timestep.expand(2 * count), ids, keep, sizes).float()
        without, with_caption = predicted.chunk(2)
        latents = scheduler.step(without + GUIDANCE * (with_caption - without), timestep, latents).prev_sample
    images = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).byte().cpu()
    rows = [torch.cat([*row], dim=2) for row in torch.split(pixels, 4)]
    save_image(Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()), file)
    file.with_suffix(".txt").write_text("\n".join(captions) + "\n")
