"""Scenes as the judge and the CLIP model see them: rendered, and half of them sent through the autoencoder."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from atedm.tiny.autoencoder import rebuilt
from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import Scene, sample_scene

_HELD = 32
"""Batches that are held."""


class Seen(NamedTuple):
    """A batch of scenes and their pictures."""

    scenes: list[Scene]
    #: (B, 3, 256, 256) float32 in [0, 1].
    images: Tensor
    #: (B, 3, 256, 256): see `atedm.tiny.rendering.Rendered`.
    masks: Tensor


class SeenScenes:
    """Batches of training scenes. Each is drawn several times, because rendering takes longer than a training step.

    Half of a batch has gone through the autoencoder, with noise on the latents, as every picture to be scored has.
    """

    def __init__(
        self, atlas: Atlas, autoencoder: AutoencoderTiny, rng: np.random.Generator, *, batch: int, uses: int
    ) -> None:
        """Take objects and autoencoder, on one device; the batch size; and how often each batch is drawn."""
        self._atlas, self._autoencoder, self._rng = atlas, autoencoder, rng
        self._batch, self._uses = batch, uses
        self._held: list[Seen] = []
        self._drawn = 0

    def draw(self) -> Seen:
        """Draw a batch at random."""
        if self._drawn % self._uses == 0:
            self._held = [*self._held[-_HELD + 1 :], self._render()]
        self._drawn += 1
        return self._held[int(self._rng.integers(len(self._held)))]

    def _render(self) -> Seen:
        scenes = [sample_scene(self._rng) for _ in range(self._batch)]
        rendered = render(scenes, self._atlas, self._rng)
        through, as_they_are = rendered.images.tensor_split(2)
        return Seen(scenes, torch.cat([rebuilt(self._autoencoder, through), as_they_are]), rendered.masks)
