"""Where the objects of a scene stand: places and sizes that agree with its words, the rest by chance.

Sizes are few and vary little, because a small model learns the look of an object anew for each size of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from atedm.tiny.scenes import Scene


class Placed(NamedTuple):
    """One object on the canvas, in shares of its side."""

    name: str
    x: float
    y: float
    #: Width and height of the square that holds the picture.
    side: float
    #: Radians.
    tilt: float
    is_mirrored: bool
    #: Whether it stands on the ground and casts a shadow.
    stands: bool = True


def place_objects(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Place the objects of a scene, those behind first."""
    one = rng.uniform
    if len(scene.objects) == 1:
        low, high = {"small": (0.29, 0.32), "large": (0.66, 0.72), None: (0.46, 0.52)}[scene.size]
        side = one(low, high)
        free = (1 - side) / 2 * 0.5
        places = [(0.5 + one(-free, free), 0.52 + one(-free, free) * 0.6, side)]
    elif len(scene.objects) == 3:
        sides = [one(0.29, 0.32) for _ in range(3)]
        middle = one(0.48, 0.64)
        places = [
            (x + one(-0.02, 0.02), middle + one(-0.04, 0.04), s) for x, s in zip((0.18, 0.5, 0.82), sides, strict=True)
        ]
    elif scene.relation == "left of":
        sides = [one(0.40, 0.44) for _ in range(2)]
        middle = one(0.45, 0.62)
        places = [
            (x + one(-0.03, 0.03), middle + one(-0.05, 0.05), s) for x, s in zip((0.26, 0.74), sides, strict=True)
        ]
    elif scene.relation == "above":
        sides = [one(0.40, 0.43), one(0.41, 0.44)]
        middle = one(0.35, 0.65)
        places = [
            (middle + one(-0.05, 0.05), y + one(-0.02, 0.02), s) for y, s in zip((0.24, 0.74), sides, strict=True)
        ]
    else:  # the first, smaller and lower, hides a part of the second
        side, behind = one(0.39, 0.42), one(0.62, 0.66)
        x, y = one(0.42, 0.58), one(0.4, 0.46)
        away = one(0.12, 0.2) * (1 if rng.random() < 0.5 else -1)
        places = [(x + away, y + behind / 2 - side / 2 + one(0.06, 0.12), side), (x - away / 3, y, behind)]
    placed = [
        Placed(name, x, y, side, one(-0.04, 0.04), bool(rng.random() < 0.5))
        for name, (x, y, side) in zip(scene.objects, places, strict=True)
    ]
    if scene.relation == "above":
        placed[0] = placed[0]._replace(stands=False)
    return placed[::-1] if scene.relation == "in front of" else placed
