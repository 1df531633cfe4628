"""Captions that are wrong in one thing: what the CLIP model has to tell from the right one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import BACKGROUNDS, RELATIONS, SIZES, Scene

KINDS = ("count", "object", "relation", "size", "background")
"""What a caption can be wrong in."""


def changed(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """Change one thing a caption says so that the picture no longer shows it.

    Args:
        scene: What the picture shows.
        kind: One of `KINDS`. "count" leaves out one object or adds one, "object" replaces one, "relation" takes another
            relation, or the same the other way round.
        rng: Source of the choice.

    Returns:
        A scene that differs, or None where the caption says nothing of that kind.
    """
    objects = list(scene.objects)
    which = int(rng.integers(len(objects)))
    if kind == "count":
        if len(objects) == 1:
            more = (objects[0], _other(OBJECTS, objects, rng))
            return replace(scene, objects=more, relation=str(rng.choice(RELATIONS)), size=None)
        del objects[which]
        relation = str(rng.choice(RELATIONS)) if len(objects) == 2 else None
        return replace(scene, objects=tuple(objects), relation=relation)
    if kind == "object":
        objects[which] = _other(OBJECTS, objects, rng)
        return replace(scene, objects=tuple(objects))
    if kind == "relation" and scene.relation is not None:
        if rng.random() < 0.5:
            return replace(scene, objects=scene.objects[::-1])
        return replace(scene, relation=_other(RELATIONS, [scene.relation], rng))
    if kind == "size" and scene.size is not None:
        return replace(scene, size=_other(SIZES, [scene.size], rng))
    if kind == "background" and not scene.is_short:
        return replace(scene, background=_other(BACKGROUNDS, [scene.background], rng))
    return None


def wrong_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One caption for each of `KINDS`, wrong in that and none held out; where a kind has none, another object."""
    captions = []
    for kind in KINDS:
        wrong = changed(scene, kind, rng)
        while wrong is None or wrong.held_out:
            wrong = changed(scene, "object", rng)
        captions.append(wrong.caption)
    return captions


def _other(words: Iterable[str], but: Iterable[str], rng: np.random.Generator) -> str:
    return str(rng.choice([word for word in words if word not in set(but)]))
