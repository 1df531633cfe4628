"""The shipped model's autoencoder: a factor-4 `AutoencoderTiny` with four latent channels, trained on scenes."""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import sample_scene

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


def train_autoencoder(atlas: Atlas, seconds: float, *, batch: int = 16, seed: int = 0) -> AutoencoderTiny:
    """Train the autoencoder for a wall-clock time and scale its latents to unit variance.

    Args:
        atlas: Of the objects, on the device to train on.
        seconds: Training time.
        batch: 64 px crops a step.
        seed: Of scenes, noise and weights.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    pools = [_pool(atlas, rng, canvas, count) for canvas, count in ((256, 256), (128, 512))]

    def crops(step: int) -> Tensor:
        if step % 500 == 499:  # fresh scenes, a part at a time
            turn = step // 500 % 2
            fresh = _pool(atlas, rng, (256, 128)[turn], len(pools[turn]) // 4)
            pools[turn] = torch.cat([pools[turn][len(fresh) :], fresh])
        return random_crops(pools[step % 2], batch, rng)

    model = build_autoencoder().train().to(atlas.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    # On a CPU a step takes half of the time once it is compiled.
    encoder, decoder = torch.compile(model.encoder), torch.compile(model.decoder)
    start, step, shown = time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * spent / seconds)))
        # Noise on the latents, so that the decoder forgives the small errors that a diffusion model makes.
        sigma = 0.07 - 0.06 * spent / seconds
        images = crops(step) * 2 - 1
        with torch.autocast(atlas.device.type, torch.bfloat16):
            latents = encoder(images)  # type: ignore[no-untyped-call]
            decoded = decoder(latents + sigma * torch.randn_like(latents))  # type: ignore[no-untyped-call]
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
            psnr = 10 * torch.log10(4 / functional.mse_loss(decoded.detach(), images))
            print(f"autoencoder: {spent:.0f} s, step {step}, {psnr:.1f} dB, std {latents.std():.2f}")
    with torch.inference_mode():
        latents = torch.cat([model.eval().encode(chunk * 2 - 1).latents for chunk in torch.split(pools[1][:256], 32)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    print(f"autoencoder: done after {step} steps, scaling factor {model.config.scaling_factor}")
    return model


@torch.no_grad()
def rebuilt(autoencoder: AutoencoderTiny, images: Tensor) -> Tensor:
    """Send images in [0, 1] through an autoencoder, with the noise on the latents that a diffusion model leaves."""
    with torch.autocast(images.device.type, torch.bfloat16):
        latents = autoencoder.encode(images * 2 - 1).latents
        decoded: Tensor = autoencoder.decode(latents + 0.05 * torch.randn_like(latents)).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def random_crops(pool: Tensor, batch: int, rng: np.random.Generator) -> Tensor:
    """Cut ``batch`` squares of 64 px out of images (N, 3, h, w)."""
    corners = rng.integers(0, pool.shape[-1] - _CROP + 1, size=(batch, 2))
    chosen = rng.integers(0, len(pool), size=batch)
    crops = [pool[i, :, y : y + _CROP, x : x + _CROP] for i, (y, x) in zip(chosen, corners, strict=True)]
    return torch.stack(crops)


def _pool(atlas: Atlas, rng: np.random.Generator, canvas: int, count: int) -> Tensor:
    parts = [
        render([sample_scene(rng) for _ in range(min(32, count - start))], atlas, rng, canvas).images
        for start in range(0, count, 32)
    ]
    return torch.cat(parts)
