"""Scenes: one to three objects, how they stand to each other, and what is behind them, with a caption for each."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atedm.tiny.objects import OBJECTS, with_article
from atedm.words import check_name

#: What is said of a background, by its name.
BACKGROUNDS: dict[str, str] = {
    "meadow": "in a green meadow",
    "sea": "by the sea",
    "night": "under a night sky",
    "desert": "in a desert",
    "snow": "in the snow",
    "room": "in a room",
    "pink": "on a pink background",
    "blue": "on a blue background",
    "yellow": "on a yellow background",
    "gray": "on a gray background",
}
#: How the first object of two stands to the second.
RELATIONS = ("left of", "above", "in front of")
#: Words for the size of an object that stands alone; none is a usual size.
SIZES = ("small", "large")

CANVAS = 256
"""Width and height, in pixels, that scenes are drawn at."""
HELD_OUT = 20
"""One caption in so many is kept from training."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Raises:
        ValueError: If a word is unknown, or the words do not go together.
    """

    #: One to three names of `OBJECTS`, all different. Three stand in a row, from left to right.
    objects: tuple[str, ...]
    #: One of `BACKGROUNDS`.
    background: str
    #: One of `RELATIONS` for two objects.
    relation: str | None = None
    #: One of `SIZES` for one object, or None.
    size: str | None = None
    #: Whether the caption says nothing of the background.
    is_short: bool = False

    def __post_init__(self) -> None:
        """Check the words."""
        if not 1 <= len(self.objects) <= 3 or len(set(self.objects)) < len(self.objects):
            raise ValueError(f"a scene has one to three different objects, not {self.objects}")
        for name in self.objects:
            check_name("object", name, OBJECTS)
        check_name("background", self.background, BACKGROUNDS)
        if (self.relation is not None) != (len(self.objects) == 2):
            raise ValueError("two objects need a relation, and one or three have none")
        if self.relation is not None:
            check_name("relation", self.relation, RELATIONS)
        if self.size is not None:
            check_name("size", self.size, SIZES)
            if len(self.objects) > 1:
                raise ValueError("only an object that stands alone has a size")

    @property
    def subject(self) -> str:
        """The caption without its background: "a duck in front of a volcano"."""
        names = [with_article(f"{self.size} {name}" if self.size else name) for name in self.objects]
        if len(names) == 3:
            return f"{names[0]}, {names[1]} and {names[2]}"
        return names[0] if self.relation is None else f"{names[0]} {self.relation} {names[1]}"

    @property
    def caption(self) -> str:
        """The whole caption: "a duck in front of a volcano under a night sky"."""
        return self.subject if self.is_short else f"{self.subject} {BACKGROUNDS[self.background]}"

    @property
    def held_out(self) -> bool:
        """Whether this caption is kept from training, by a checksum of it."""
        return zlib.crc32(self.caption.encode()) % HELD_OUT == 0


def sample_scene(
    rng: np.random.Generator,
    *,
    objects: int | None = None,
    held_out: bool = False,
    names: Sequence[str] = tuple(OBJECTS),
) -> Scene:
    """Draw a scene at random, either always or never one of the held-out captions.

    Args:
        rng: Source of the choice.
        objects: How many; by default one, two or three at 30, 50 and 20 %.
        held_out: Draw from the captions that training never sees (True) or from the others (False).
        names: Of the objects to choose from.
    """
    while True:
        count = objects or int(rng.choice(3, p=(0.3, 0.5, 0.2))) + 1
        chosen = rng.choice(len(names), size=count, replace=False)
        scene = Scene(
            objects=tuple(names[i] for i in chosen),
            background=str(rng.choice([*BACKGROUNDS])),
            relation=str(rng.choice(RELATIONS)) if count == 2 else None,
            size=str(rng.choice(SIZES)) if count == 1 and rng.random() < 0.3 else None,
            is_short=not held_out and bool(rng.random() < 0.1),
        )
        if scene.held_out == held_out:
            return scene


def held_out_scenes(count: int, seed: int = 0, names: Sequence[str] = tuple(OBJECTS)) -> list[Scene]:
    """Draw ``count`` scenes whose captions the model was never trained on, of objects among ``names``."""
    rng = np.random.default_rng([seed, 77])
    return [sample_scene(rng, held_out=True, names=names) for _ in range(count)]
