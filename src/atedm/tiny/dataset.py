"""Scenes rendered and encoded ahead of training, one file a shard."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from atedm.files import written_whole
from atedm.tiny.scenes import CANVAS, Scene, render_batch, sample_scene
from atedm.tiny.text import TOKENS


class EncodedScenes(NamedTuple):
    """Latents (N, 4, h, w) float16, scaled to unit variance, and token ids (N, TOKENS) int16."""

    latents: Tensor
    ids: Tensor


def encode_scenes(
    autoencoder: AutoencoderTiny, tokenizer: CLIPTokenizer, count: int, canvas: int, seed: int, cache: Path
) -> EncodedScenes:
    """Render and encode ``count`` training scenes, or read them back if ``cache`` has them already.

    A canvas smaller than `CANVAS` holds one object. One caption in eight leaves its background unsaid, so that short
    prompts are within what the model has read.
    """
    file = cache / f"scenes-{canvas}-{count}-{seed}.safetensors"
    if file.exists():
        return EncodedScenes(**load_file(file))
    rng = np.random.default_rng([seed, canvas])
    latents, ids = [], []
    for start in range(0, count, 32):
        scenes = [sample_scene(rng, 1 if canvas < CANVAS else None) for _ in range(min(32, count - start))]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            encoded = autoencoder.encode(render_batch(scenes, rng, canvas) * 2 - 1).latents
        latents.append((encoded.float() * autoencoder.config.scaling_factor).half())
        ids.append(_tokenize(tokenizer, scenes, rng))
    shard = EncodedScenes(torch.cat(latents), torch.cat(ids))
    with written_whole(file) as partial:
        save_file(shard._asdict(), partial)
    return shard


def _tokenize(tokenizer: CLIPTokenizer, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    captions = [scene.subject if rng.random() < 0.125 else scene.caption for scene in scenes]
    batch = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids.to(torch.int16)  # type: ignore[no-any-return]
