"""First lessons of the text encoders: what the objects look like, before the U-Net learns to draw them.

SDXL's encoders come from CLIP and know what words look like. Ours start from nothing, and by the U-Net's gradients
alone they learn slowly. So each name learns to tell the small picture of its object, and the whole caption that of its
scene, both by one linear or shallow layer that is thrown away afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from atedm.tiny.data import tokenize
from atedm.tiny.objects import OBJECTS
from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import Scene, sample_scene

_SIDE = 16
"""Of the small pictures."""
_NAMES = tuple(OBJECTS)


class Lessons(NamedTuple):
    """Captions and what they show."""

    #: (N, tokens) int64.
    ids: Tensor
    #: (N, 3) int64: rows of the objects, -1 where there is none.
    objects: Tensor
    #: (N, 3) int64: the last token of each name.
    places: Tensor
    #: (N, 3 * 16 * 16): the scenes, small.
    pictures: Tensor


def teach_text_encoders(
    encoders: tuple[Any, Any],
    tokenizer: CLIPTokenizer,
    atlas: Atlas,
    steps: int,
    *,
    scenes: int = 12_800,
    batch: int = 128,
    every: int = 500,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Train both encoders in place.

    Args:
        encoders: As `build_text_encoders` gives them, on the device of the atlas.
        tokenizer: Of the captions.
        atlas: Of the objects.
        steps: How many; the learning rate falls to zero over them.
        scenes: How many captions there are to learn from.
        batch: Captions a step.
        every: After how many steps progress is told.
        seed: Of scenes and of what is thrown away.
        report: Told of progress.
    """
    first, second = encoders
    torch.manual_seed(seed)
    lessons = make_lessons(tokenizer, atlas, scenes, np.random.default_rng([seed, 2]))
    looks = functional.adaptive_avg_pool2d(atlas.levels[-1], _SIDE).flatten(1)
    looks = (looks - looks.mean(0)) / looks.std()
    pictures = (lessons.pictures - lessons.pictures.mean(0)) / lessons.pictures.std()
    width = 2 * first.config.hidden_size
    tells = nn.ModuleDict(
        {
            "look": nn.Linear(width, looks.shape[1]),
            "name": nn.Linear(width, len(_NAMES)),
            "picture": nn.Sequential(
                nn.Linear(second.config.projection_dim, 256), nn.SiLU(), nn.Linear(256, pictures.shape[1])
            ),
        }
    ).to(atlas.device)
    trained = [*first.parameters(), *second.parameters(), *tells.parameters()]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=3e-3, weight_decay=0.01)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = torch.randint(len(lessons.ids), (batch,)).to(atlas.device)
        ids, objects, places = lessons.ids[rows], lessons.objects[rows], lessons.places[rows]
        both = second(ids, output_hidden_states=True)
        words = torch.cat([first(ids, output_hidden_states=True).hidden_states[-2], both.hidden_states[-2]], dim=-1)
        named = words.gather(1, places[..., None].expand(-1, -1, width))[objects >= 0]
        asked = objects[objects >= 0]
        look = functional.mse_loss(tells["look"](named), looks[asked])
        picture = functional.mse_loss(tells["picture"](both.text_embeds), pictures[rows])
        name = functional.cross_entropy(tells["name"](named), asked)
        loss = look + picture + 0.1 * name + 1e-3 * words.square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % every == 0:
            report(
                f"text: step {step}, error of looks {float(look.detach()):.4f}, of scenes {float(picture.detach()):.3f}"
            )


def make_lessons(tokenizer: CLIPTokenizer, atlas: Atlas, count: int, rng: np.random.Generator) -> Lessons:
    """Make ``count`` captions, never held-out ones, with what they show."""
    scenes = [sample_scene(rng) for _ in range(count)]
    ids = tokenize(tokenizer, [scene.caption for scene in scenes])
    objects = torch.full((count, 3), -1)
    places = torch.zeros(count, 3, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for turn, (name, place) in enumerate(zip(scene.objects, last_tokens(tokenizer, scene), strict=True)):
            objects[row, turn], places[row, turn] = _NAMES.index(name), place
    pictures = [
        functional.adaptive_avg_pool2d(render(scenes[start : start + 64], atlas, rng, 64).images, _SIDE)
        for start in range(0, count, 64)
    ]
    device = atlas.device
    return Lessons(ids.to(device), objects.to(device), places.to(device), torch.cat(pictures).flatten(1))


def last_tokens(tokenizer: CLIPTokenizer, scene: Scene) -> list[int]:
    """Say where in the caption's tokens the name of each object ends."""
    ids = tokenizer(scene.caption).input_ids
    places, start = [], 0
    for name in scene.objects:
        wanted = tokenizer(name, add_special_tokens=False).input_ids
        while ids[start : start + len(wanted)] != wanted:
            start += 1
        start += len(wanted)
        places.append(start - 1)
    return places
