"""Training scenes, rendered and encoded while the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTokenizer

from atedm.tiny.autoencoder import FACTOR
from atedm.tiny.features import TOKEN, WIDTHS, Teacher
from atedm.tiny.objects import OBJECTS
from atedm.tiny.rendering import Atlas, Rendered, render
from atedm.tiny.scenes import sample_scene
from atedm.tiny.text import TOKENS

_CHUNK = 32


class Batch(NamedTuple):
    """What one step trains on."""

    #: (B, 4, h, w) float32, scaled to unit variance.
    latents: Tensor
    #: (B, TOKENS) int64.
    ids: Tensor
    #: (B, 6) int64: see `atedm.tiny.denoiser.whole_picture`.
    sizes: Tensor
    #: Of a teacher, (B, tokens, width) float16 each: see `atedm.tiny.features`.
    features: tuple[Tensor, ...] = ()


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
        crop: int | None = None,
        teacher: Teacher | None = None,
        names: Sequence[str] = tuple(OBJECTS),
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
            crop: Pixels a side of squares around an object that are given in place of whole pictures.
            teacher: Whose features of the pictures go with them.
            names: Of the objects to choose from.
        """
        self._atlas, self._autoencoder, self._tokenizer = atlas, autoencoder, tokenizer
        self._canvas, self._uses, self._objects, self._crop = canvas, uses, objects, crop or canvas
        self._rng, self._teacher, self._names = np.random.default_rng([seed, canvas]), teacher, names
        side = self._crop // FACTOR
        self._latents = torch.empty(size, 4, side, side, dtype=torch.float16, device=atlas.device)
        self._ids = torch.empty(size, TOKENS, dtype=torch.long, device=atlas.device)
        self._sizes = torch.empty(size, 6, dtype=torch.long, device=atlas.device)
        tokens = (self._crop // TOKEN) ** 2
        self._features = [
            torch.empty(size, tokens, width, dtype=torch.float16, device=atlas.device) for width in WIDTHS if teacher
        ]
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
        features = tuple(held[rows] for held in self._features)
        return Batch(self._latents[rows].float(), self._ids[rows], self._sizes[rows], features)

    @torch.inference_mode()
    def _replace(self, count: int) -> None:
        scenes = [sample_scene(self._rng, objects=self._objects, names=self._names) for _ in range(count)]
        rendered = render(scenes, self._atlas, self._rng, self._canvas)
        images, corners = crop_around_objects(rendered, self._crop, self._rng)
        with torch.autocast(images.device.type, torch.bfloat16):
            encoded = self._autoencoder.encode(images * 2 - 1).latents
        rows = (self._next + torch.arange(count)) % len(self._ids)
        self._next = int(rows[-1]) + 1
        self._latents[rows] = (encoded.float() * self._autoencoder.config.scaling_factor).half()
        original, target = (torch.full((count, 2), side) for side in (self._canvas, self._crop))
        self._sizes[rows] = torch.cat([original, corners, target], dim=1).to(self._sizes.device)
        self._ids[rows] = tokenize(self._tokenizer, [scene.caption for scene in scenes]).to(self._ids.device)
        if self._teacher is not None:
            shown = self._teacher.features(self._latents[rows].float(), self._ids[rows], self._sizes[rows])
            for held, new in zip(self._features, shown, strict=True):
                held[rows] = new


def crop_around_objects(rendered: Rendered, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cut a square out of each picture, about the middle of one of its objects.

    Args:
        rendered: Pictures of one size.
        side: Pixels a side of the squares.
        rng: Source of which object, and of how far it is from the middle.

    Returns:
        The squares, (B, 3, side, side), and their top and left, (B, 2) int64.
    """
    images, masks = rendered.images, rendered.masks.cpu()
    canvas = images.shape[-1]
    corners = torch.zeros(len(images), 2, dtype=torch.long)
    if side == canvas:
        return images, corners
    places = torch.arange(canvas) + 0.5
    for row, mask in enumerate(masks):
        shown = mask[int(rng.choice([i for i, one in enumerate(mask) if one.sum() > 0]))]
        weight = shown.sum()
        middle = np.array([(shown.sum(1) @ places / weight).item(), (shown.sum(0) @ places / weight).item()])
        corner = middle - side / 2 + rng.uniform(-side / 8, side / 8, size=2)
        corners[row] = torch.from_numpy(corner.round()).long().clamp(0, canvas - side)
    squares = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners.tolist(), strict=True)]
    return torch.stack(squares), corners


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """(B, TOKENS) int64."""
    batch = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids
