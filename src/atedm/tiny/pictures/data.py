"""Training scenes, rendered and encoded while the model trains."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTokenizer

from atedm.tiny.pictures.autoencoder import FACTOR
from atedm.tiny.pictures.rendering import Atlas, render
from atedm.tiny.pictures.scenes import sample_scene
from atedm.tiny.pictures.text import TOKENS

_CHUNK = 32


class Batch(NamedTuple):
    """What one step trains on."""

    #: (B, 4, h, w) float32, scaled to unit variance.
    latents: Tensor
    #: (B, TOKENS) int64.
    ids: Tensor


class ScenePool:
    """Encoded scenes to draw batches from, a part of which is replaced at every draw.

    On a CPU rendering and encoding takes a seventh of the time of a training step, so each scene is used several times.
    On a GPU it takes next to nothing, and every scene is new.
    """

    def __init__(
        self,
        atlas: Atlas,
        autoencoder: AutoencoderTiny,
        tokenizer: CLIPTokenizer,
        canvas: int,
        *,
        size: int = 2048,
        uses: int = 4,
        seed: int = 0,
        objects: int | None = None,
    ) -> None:
        """Fill the pool.

        Args:
            atlas: On the device that trains.
            autoencoder: Likewise.
            tokenizer: Of the captions.
            canvas: Pixels a side.
            size: How many scenes it holds.
            uses: How often each is drawn, on average.
            seed: Of the scenes.
            objects: As `sample_scene`.
        """
        self._atlas, self._autoencoder, self._tokenizer = atlas, autoencoder, tokenizer
        self._canvas, self._uses, self._objects = canvas, uses, objects
        self._rng = np.random.default_rng([seed, canvas])
        side = canvas // FACTOR
        self._latents = torch.empty(size, 4, side, side, dtype=torch.float16, device=atlas.device)
        self._ids = torch.empty(size, TOKENS, dtype=torch.long, device=atlas.device)
        self._next, self._owed = 0, 0.0
        for _ in range(0, size, _CHUNK):
            self._replace(_CHUNK)

    def draw(self, batch: int) -> Batch:
        """Draw a batch at random."""
        self._owed += batch / self._uses
        while self._owed >= _CHUNK:
            self._replace(_CHUNK)
            self._owed -= _CHUNK
        rows = torch.from_numpy(self._rng.integers(0, len(self._ids), size=batch)).to(self._ids.device)
        return Batch(self._latents[rows].float(), self._ids[rows])

    @torch.inference_mode()
    def _replace(self, count: int) -> None:
        scenes = [sample_scene(self._rng, objects=self._objects) for _ in range(count)]
        images = render(scenes, self._atlas, self._rng, self._canvas).images
        with torch.autocast(images.device.type, torch.bfloat16):
            encoded = self._autoencoder.encode(images * 2 - 1).latents
        rows = (self._next + torch.arange(count)) % len(self._ids)
        self._next = int(rows[-1]) + 1
        self._latents[rows] = (encoded.float() * self._autoencoder.config.scaling_factor).half()
        self._ids[rows] = tokenize(self._tokenizer, [scene.caption for scene in scenes]).to(self._ids.device)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """(B, TOKENS) int64."""
    batch = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids
