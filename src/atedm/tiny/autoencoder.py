"""The shapes model's autoencoder, trained on its scenes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from atedm.tiny.pictures.autoencoder import fit, random_crops, scale_latents
from atedm.tiny.scenes import render_batch, sample_scene


def train_autoencoder(
    seconds: float, *, batch: int = 32, scenes: int = 768, seed: int = 0, report: Callable[[str], None] = print
) -> AutoencoderTiny:
    """Train the autoencoder for a wall-clock time and scale its latents to unit variance.

    Args:
        seconds: Training time.
        batch: 64 px crops a step.
        scenes: Rendered ahead.
        seed: Of scenes, noise and weights.
        report: Told of progress now and then.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    pool = render_batch([sample_scene(rng) for _ in range(scenes)], rng)

    def crops(_: int) -> Tensor:
        return random_crops(pool, batch, rng)

    model = fit(crops, seconds, noise=(0.08, 0.08), compiled=False, report=report)
    return scale_latents(model, pool[:256], report)
