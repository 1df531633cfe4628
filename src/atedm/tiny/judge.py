"""The judge of the model that ships: a small network that reads a scene off a picture, and the score it gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import BACKGROUNDS, CANVAS, RELATIONS, SIZES, Scene

ATTRIBUTES = ("count", "object", "relation", "size", "background")
"""What a caption is scored on. An object counts once each; relation where there are several; size where it is said."""

JUDGE = "judge.safetensors"
"""Name of the judge's weights, in a run and in the folder that ships."""
MAP = 32
"""Rows and columns of the map of where objects are: a token of the first attention level each, at 256 px."""
HEADS: dict[str, tuple[str | None, ...]] = {
    "count": ("1", "2", "3"),
    "relation": RELATIONS,
    "size": (None, *SIZES),
    "background": tuple(BACKGROUNDS),
}
_NAMES = tuple(OBJECTS)


class SceneReader(nn.Module):
    """Reads a scene off (B, 3, 256, 256) images in [0, 1]: the object at each place, and count, relation and so on."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.down = nn.ModuleList(_layer(a, b, stride=2) for a, b in pairwise((3, 24, 48, 80, width, width)))
        self.up = nn.ModuleList([_layer(2 * width, width), _layer(width + 80, width)])
        self.place = nn.Conv2d(width, len(_NAMES) + 1, 1)
        self.layout = nn.Sequential(nn.Conv2d(width, 16, 1), nn.SiLU(), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(width + 16 * 64, len(words)) for name, words in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Give logits: (B, 1 + objects, MAP, MAP) "places", nothing first, and (B, number of words) of `HEADS`."""
        features = images * 2 - 1
        levels = []
        for layer in self.down:
            features = layer(features)
            levels.append(features)
        of_all = torch.cat([features.mean((2, 3)), self.layout(features)], dim=1)
        for layer, finer in zip(self.up, levels[-2:-4:-1], strict=True):
            coarse = functional.interpolate(features, finer.shape[-2:], mode="bilinear")
            features = layer(torch.cat([coarse, finer], dim=1))
        return {"places": self.place(features)} | {name: head(of_all) for name, head in self.heads.items()}

    @torch.inference_mode()
    def object_maps(self, images: Tensor) -> Tensor:
        """Say how likely an object is at each place of (B, 3, h, w) images in [0, 1]: (B, MAP, MAP) in [0, 1]."""
        maps: Tensor = 1 - self(self._prepared(images))["places"].softmax(1)[:, 0]
        return maps

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Reading]:
        """Say what each of (B, 3, h, w) images in [0, 1] shows; other sizes are scaled."""
        logits = self(self._prepared(images))
        chosen = {name: [HEADS[name][i] for i in logits[name].argmax(-1).tolist()] for name in HEADS}
        maps = logits["places"].float().softmax(1)[:, 1:].cpu()
        readings = []
        for row, of_image in enumerate(maps):
            count = int(chosen["count"][row] or 1)
            relation = chosen["relation"][row] if count == 2 else None
            size = chosen["size"][row] if count == 1 else None
            found = of_image.sum((1, 2)).topk(count).indices.tolist()
            objects = tuple(_NAMES[i] for i in _in_order(found, of_image, relation))
            readings.append(Reading(objects, relation, size, str(chosen["background"][row])))
        return readings

    def _prepared(self, images: Tensor) -> Tensor:
        images = images.to(next(self.parameters()).device).float()
        if images.shape[-2:] != (CANVAS, CANVAS):
            images = functional.interpolate(images, (CANVAS, CANVAS), mode="bilinear", antialias=True)
        return images


def _layer(a: int, b: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.GroupNorm(8, b), nn.SiLU())


def _in_order(found: list[int], maps: Tensor, relation: str | None) -> list[int]:
    """Sort objects as a caption names them: the upper one first, the front one (which is lower), or the left one."""
    ramp = torch.arange(MAP, dtype=torch.float32)

    def key(which: int) -> float:
        of_object = maps[which]
        rows, columns = (of_object.sum(side) @ ramp / of_object.sum() for side in (1, 0))
        return float({"above": rows, "in front of": -rows}.get(relation or "", columns))

    return sorted(found, key=key)


class Reading(NamedTuple):
    """What a picture shows, as the judge reads it."""

    #: In the order of the caption, all different.
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
    """Return the right class of each scene, (B,), for each of `HEADS`; -1 where there is none."""
    return {
        "count": torch.tensor([len(scene.objects) - 1 for scene in scenes]),
        "relation": torch.tensor([-1 if s.relation is None else RELATIONS.index(s.relation) for s in scenes]),
        "size": torch.tensor([HEADS["size"].index(s.size) if len(s.objects) == 1 else -1 for s in scenes]),
        "background": torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes]),
    }


def places_of(scenes: Sequence[Scene], masks: Tensor) -> Tensor:
    """Return how much of a place is each object, nothing first: (B, 1 + objects, MAP, MAP), of masks (B, 3, h, w)."""
    shares = functional.adaptive_avg_pool2d(masks, MAP)
    places = torch.zeros(len(scenes), 1 + len(_NAMES), MAP, MAP, device=masks.device)
    for row, scene in enumerate(scenes):
        for share, name in zip(shares[row], scene.objects, strict=False):  # masks of objects that are not there
            places[row, 1 + _NAMES.index(name)] = share
    places[:, 0] = 1 - places[:, 1:].sum(1)
    return places.clamp(0, 1)


def save_judge(model: SceneReader, file: Path) -> None:
    """Write the judge as float16 safetensors."""
    save_model(model.half(), str(file))


def load_judge(file: Path) -> SceneReader:
    """Read the judge back, in float32 and ready to use."""
    model = SceneReader().half()
    load_model(model, str(file))
    return model.float().eval()
