"""The picture model's autoencoder: a factor-4 `AutoencoderTiny` with four latent channels, trained on scenes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from atedm.tiny.pictures.rendering import Atlas, render
from atedm.tiny.pictures.scenes import sample_scene

FACTOR = 4
"""Pixels a side that one latent stands for."""
_CROP = 64


def build_autoencoder() -> AutoencoderTiny:
    """Build the untrained autoencoder (256 px image -> 4 x 64 x 64 latents)."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
        scaling_factor=1.0,
    )


def train_autoencoder(
    atlas: Atlas, seconds: float, *, batch: int = 16, seed: int = 0, report: Callable[[str], None] = print
) -> AutoencoderTiny:
    """Train the autoencoder for a wall-clock time and scale its latents to unit variance.

    Noise is added to the latents while training, so that the decoder forgives the small errors a diffusion model makes.
    The scale is folded into ``config.scaling_factor``, where diffusers pipelines look for it.

    Args:
        atlas: Of the objects, on the device to train on.
        seconds: Training time.
        batch: 64 px crops a step.
        seed: Of scenes, noise and weights.
        report: Told of progress now and then.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    device = atlas.device
    model = build_autoencoder().train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    # Compiled, a step takes half of the time on a CPU.
    encoder, decoder = torch.compile(model.encoder), torch.compile(model.decoder)
    pools = [_pool(atlas, rng, canvas, count) for canvas, count in ((256, 256), (128, 512))]
    start, step, shown = time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - start) < seconds:
        if step % 500 == 499:  # fresh scenes, a part at a time
            turn = step // 500 % 2
            fresh = _pool(atlas, rng, (256, 128)[turn], len(pools[turn]) // 4)
            pools[turn] = torch.cat([pools[turn][len(fresh) :], fresh])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * spent / seconds)))
        noise = 0.06 * (1 - spent / seconds) + 0.01
        images = _crops(pools[step % 2], batch, rng) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            latents = encoder(images)  # type: ignore[no-untyped-call]
            decoded = decoder(latents + noise * torch.randn_like(latents))  # type: ignore[no-untyped-call]
        decoded, latents = decoded.float(), latents.float()
        # The penalty keeps the latents round one, where the decoder's own soft clamp at +-3 leaves them alone.
        loss = (decoded - images).abs().mean() + 2 * functional.mse_loss(decoded, images)
        loss = loss + 2e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if spent - shown > 15:
            shown = spent
            report(f"autoencoder: {spent:.0f} s, step {step}, {_psnr(decoded, images):.1f} dB, std {latents.std():.2f}")
    model.eval()
    with torch.inference_mode():
        latents = torch.cat([model.encode(chunk * 2 - 1).latents for chunk in torch.split(pools[1][:256], 32)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    report(f"autoencoder: done after {step} steps, scaling factor {model.config.scaling_factor}")
    return model


def _pool(atlas: Atlas, rng: np.random.Generator, canvas: int, count: int) -> Tensor:
    parts = [
        render([sample_scene(rng) for _ in range(min(32, count - start))], atlas, rng, canvas).images
        for start in range(0, count, 32)
    ]
    return torch.cat(parts)


def _crops(pool: Tensor, batch: int, rng: np.random.Generator) -> Tensor:
    corners = rng.integers(0, pool.shape[-1] - _CROP + 1, size=(batch, 2))
    chosen = rng.integers(0, len(pool), size=batch)
    crops = [pool[i, :, y : y + _CROP, x : x + _CROP] for i, (y, x) in zip(chosen, corners, strict=True)]
    return torch.stack(crops)


def _psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return float(10 * torch.log10(4 / functional.mse_loss(image.detach().float(), reference)))
