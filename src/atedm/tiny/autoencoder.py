"""The shipped model's autoencoder: a factor-4 `AutoencoderTiny` with four latent channels, trained on scenes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from atedm.tiny.scenes import CANVAS, render_batch, sample_scene

LATENT_FACTOR = 4


def build_autoencoder() -> AutoencoderTiny:
    """Build the untrained autoencoder (128 px image -> 4 x 32 x 32 latents)."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    )


def train_autoencoder(
    seconds: float, *, batch: int = 32, seed: int = 0, report: Callable[[str], None] = print
) -> AutoencoderTiny:
    """Train the autoencoder for a wall-clock time and scale its latents to unit variance.

    Noise is added to the latents while training, so that the decoder forgives the small errors a diffusion model makes.
    The scale is folded into ``config.scaling_factor``, where diffusers pipelines look for it.

    Args:
        seconds: training time.
        batch: 64 px crops per step.
        seed: seed of scenes, noise and weights.
        report: called now and then with a line of progress.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    model = build_autoencoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    pool = render_batch([sample_scene(rng) for _ in range(768)], rng)
    start, step, shown = time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * spent / seconds)))
        images = _random_crops(pool, batch, rng) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(images)
            noisy = latents + 0.08 * torch.randn_like(latents)
            decoded = model.decoder(noisy)
        decoded, latents = decoded.float(), latents.float()
        # The penalty keeps the latents round one, where the decoder's own soft clamp at +-3 leaves them alone.
        loss = (decoded - images).abs().mean() + 2 * F.mse_loss(decoded, images) + 2e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if spent - shown > 15:
            shown = spent
            report(f"autoencoder: {spent:.0f} s, step {step}, {psnr(decoded, images):.1f} dB, std {latents.std():.2f}")
    model.eval()
    with torch.inference_mode():
        std = torch.cat([model.encode(chunk * 2 - 1).latents for chunk in torch.split(pool[:256], 32)]).std()
    model.register_to_config(scaling_factor=round(1 / float(std), 4))
    report(f"autoencoder: done after {step} steps, scaling factor {model.config.scaling_factor}")
    return model


def _random_crops(pool: Tensor, batch: int, rng: np.random.Generator, size: int = 64) -> Tensor:
    corners = rng.integers(0, CANVAS - size + 1, size=(batch, 2))
    chosen = rng.integers(0, len(pool), size=batch)
    return torch.stack([pool[i, :, y : y + size, x : x + size] for i, (y, x) in zip(chosen, corners, strict=True)])


def psnr(image: Tensor, reference: Tensor, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; ``peak`` is the range of the values (2 for [-1, 1])."""
    return float(10 * torch.log10(peak**2 / F.mse_loss(image.float(), reference.float())))
