"""The judge of the picture model: a small network that reads a scene off a picture, and the score it gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from atedm.tiny.pictures.objects import OBJECTS
from atedm.tiny.pictures.scenes import BACKGROUNDS, CANVAS, RELATIONS, SIZES, Scene

ATTRIBUTES = ("count", "object", "relation", "size", "background")
"""What a caption is scored on. An object counts once each; relation where there are several; size where it is said."""

MAP = 32
"""Rows and columns of the map of where objects are: a token of the first attention level each, at 256 px."""
_MOST = 3
"""Objects in a scene."""
HEADS: dict[str, tuple[str | None, ...]] = {
    "count": ("1", "2", "3"),
    "relation": RELATIONS,
    "size": (None, *SIZES),
    "background": tuple(BACKGROUNDS),
}
_NAMES = tuple(OBJECTS)


class SceneReader(nn.Module):
    """Reads count, objects, relation, size, background and where objects are off (B, 3, 256, 256) images in [0, 1].

    Objects come in the order of the caption: the left, the upper or the front one first.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        widths = (3, 24, 48, 80, width, width)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
                for a, b in pairwise(widths)
            )
        )
        self.refine = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU())
        self.where = nn.Sequential(
            nn.Conv2d(widths[3] + width, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 1, 1)
        )
        self.places = nn.Parameter(torch.randn(64, width) * 0.02)
        self.asked = nn.Parameter(torch.randn(_MOST + 1, width) * 0.5)  # a query for each object, and one for the rest
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.objects = nn.Linear(width, len(_NAMES))
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Give the logits: (B, 3, objects) "objects", (B, MAP, MAP) "where", (B, number of words) of each of `HEADS`."""
        fine = self.stages[:3](images * 2 - 1)
        features = self.stages[3:](fine)
        features = features + self.refine(features)
        coarse = functional.interpolate(features, fine.shape[-2:], mode="bilinear")
        where = self.where(torch.cat([fine, coarse], dim=1)).squeeze(1)
        features = features.flatten(2).mT + self.places
        asked = self.asked.expand(len(images), -1, -1)
        seen = asked + self.look(asked, features, features, need_weights=False)[0]
        seen = seen + self.think(seen)
        of_all = seen[:, -1]
        logits = {"objects": self.objects(seen[:, :_MOST]), "where": where}
        return logits | {name: head(of_all) for name, head in self.heads.items()}

    @torch.inference_mode()
    def object_maps(self, images: Tensor) -> Tensor:
        """Say how likely an object is at each place of (B, 3, h, w) images in [0, 1]: (B, MAP, MAP) in [0, 1]."""
        return self(self._prepared(images))["where"].sigmoid()

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Reading]:
        """Say what each of (B, 3, h, w) images in [0, 1] shows; other sizes are scaled."""
        logits = self(self._prepared(images))
        chosen = {name: [HEADS[name][i] for i in logits[name].argmax(-1).tolist()] for name in HEADS}
        objects = logits["objects"].argmax(-1).tolist()
        return [
            Reading(
                tuple(_NAMES[i] for i in objects[row][: int(chosen["count"][row] or 1)]),
                chosen["relation"][row] if chosen["count"][row] == "2" else None,
                chosen["size"][row] if chosen["count"][row] == "1" else None,
                str(chosen["background"][row]),
            )
            for row in range(len(images))
        ]

    def _prepared(self, images: Tensor) -> Tensor:
        images = images.to(next(self.parameters()).device).float()
        if images.shape[-2:] != (CANVAS, CANVAS):
            images = functional.interpolate(images, (CANVAS, CANVAS), mode="bilinear", antialias=True)
        return images


class Reading(NamedTuple):
    """What a picture shows, as the judge reads it."""

    #: In the order of the caption; the same name may come twice.
    objects: tuple[str, ...]
    relation: str | None
    size: str | None
    background: str


class Judgement(NamedTuple):
    """How much of one caption a picture shows: per attribute, how many were right and how many there were."""

    right: dict[str, int]
    asked: dict[str, int]

    @property
    def all_right(self) -> bool:
        """Whether everything the caption says is there."""
        return self.right == self.asked


def judge(asked: Scene, seen: Reading) -> Judgement:
    """Compare what a caption asked for with what a picture shows.

    Objects are compared as a set, so that two good objects in swapped places cost the relation only.
    """
    count = len(asked.objects)
    left = list(seen.objects)
    found = 0
    for name in asked.objects:
        if name in left:
            left.remove(name)
            found += 1
    # The order is right if the objects that were found come in it.
    order = [seen.objects.index(name) for name in asked.objects if name in seen.objects]
    related = len(seen.objects) == count and seen.relation == asked.relation and order == sorted(order)
    said = not asked.is_short
    right = {
        "count": int(len(seen.objects) == count),
        "object": found,
        "relation": int(count > 1 and related),
        "size": int(asked.size is not None and seen.size == asked.size),
        "background": int(said and seen.background == asked.background),
    }
    return Judgement(
        right,
        {
            "count": 1,
            "object": count,
            "relation": int(count > 1),
            "size": int(asked.size is not None),
            "background": int(said),
        },
    )


def accuracy(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Share right of each attribute over all captions, and of captions right in everything ("all")."""
    if not judgements:
        raise ValueError("no judgements to average")
    shares = {
        name: sum(one.right[name] for one in judgements) / max(1, sum(one.asked[name] for one in judgements))
        for name in judgements[0].right
    }
    return {**shares, "all": sum(one.all_right for one in judgements) / len(judgements)}


def targets_of(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return the right classes of each scene: "objects" (B, 3) and (B,) of each of `HEADS`; -1 where there is none."""
    rows = {name: row for row, name in enumerate(_NAMES)}
    objects = [[rows[name] for name in scene.objects] + [-1] * (_MOST - len(scene.objects)) for scene in scenes]
    return {
        "objects": torch.tensor(objects),
        "count": torch.tensor([len(scene.objects) - 1 for scene in scenes]),
        "relation": torch.tensor([-1 if s.relation is None else RELATIONS.index(s.relation) for s in scenes]),
        "size": torch.tensor([HEADS["size"].index(s.size) if len(s.objects) == 1 else -1 for s in scenes]),
        "background": torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes]),
    }


def save_judge(model: SceneReader, file: Path) -> None:
    """Write the judge as float16 safetensors."""
    save_model(model.half(), str(file))


def load_judge(file: Path) -> SceneReader:
    """Read the judge back, in float32 and ready to use."""
    model = SceneReader().half()
    load_model(model, str(file))
    return model.float().eval()
