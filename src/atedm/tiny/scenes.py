"""The little world the shipped model draws: one or two coloured shapes on a patterned background.

A scene is a handful of words and a picture made of signed distance functions, so every caption has a right answer and
every picture can be judged.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atedm.words import check_name

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 210, 40),
    "purple": (130, 45, 165),
    "orange": (245, 130, 25),
    "white": (248, 248, 248),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (150, 152, 156),
    "pink": (250, 180, 200),
    "cyan": (110, 205, 220),
    "brown": (140, 98, 66),
    "lavender": (190, 172, 240),
}
TEXTURES = ("plain", "striped", "checkered")
RELATIONS = ("left of", "right of", "above", "below")
_OFFSET = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

CANVAS = 128
"""Width and height, in pixels, of a scene of two objects."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``objects`` holds (colour, shape); with two, the first stands ``relation`` the second."""

    objects: tuple[tuple[str, str], ...]
    background: str
    texture: str
    relation: str | None = None

    def __post_init__(self) -> None:
        """Refuse words the world does not know."""
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one or two objects, not {len(self.objects)}")
        if (self.relation is None) != (len(self.objects) == 1):
            raise ValueError("two objects need a relation, and one object has none")
        for colour, shape in self.objects:
            check_name("colour", colour, COLOURS)
            check_name("shape", shape, SHAPES)
        check_name("background", self.background, BACKGROUNDS)
        check_name("texture", self.texture, TEXTURES)
        if self.relation is not None:
            check_name("relation", self.relation, RELATIONS)

    @property
    def subject(self) -> str:
        """The caption without its background: "a red circle above a blue square"."""
        names = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in self.objects]
        return names[0] if self.relation is None else f"{names[0]} {self.relation} {names[1]}"

    @property
    def caption(self) -> str:
        """The whole caption: "a red circle above a blue square on a striped gray background"."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{self.subject} on a {texture}{self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether this caption is kept from training (one in twenty, by a checksum of the caption)."""
        return zlib.crc32(self.caption.encode()) % 20 == 0


def sample_scene(rng: np.random.Generator, objects: int | None = None, held_out: bool = False) -> Scene:
    """Draw a scene at random, either always or never one of the held-out captions.

    Args:
        rng: source of the choice.
        objects: 1 or 2; by default one time in four 1.
        held_out: draw from the captions that training never sees (True) or from the others (False).
    """
    while True:
        count = objects or (1 if rng.random() < 0.25 else 2)
        pairs = tuple((str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in range(count))
        scene = Scene(
            objects=pairs,
            background=str(rng.choice(list(BACKGROUNDS))),
            texture=str(rng.choice(TEXTURES)),
            relation=str(rng.choice(RELATIONS)) if count == 2 else None,
        )
        if scene.held_out == held_out:
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Draw ``count`` scenes whose captions the shipped model was never trained on."""
    rng = np.random.default_rng([seed, 77])
    return [sample_scene(rng, held_out=True) for _ in range(count)]


def _distance(shape: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Signed distance in pixels to the outline of ``shape`` of "radius" r around the origin; y points down."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * r
    if shape == "triangle":
        y = y - 0.12 * r
        return torch.maximum(y - 0.78 * r, 0.87 * x.abs() - 0.5 * y - 0.56 * r)
    if shape == "cross":
        long, short = 1.05 * r, 0.36 * r
        return torch.minimum(
            torch.maximum(x.abs() - long, y.abs() - short), torch.maximum(x.abs() - short, y.abs() - long)
        )
    return ((x * x + y * y).sqrt() - 0.78 * r).abs() - 0.27 * r  # ring


def render(scene: Scene, rng: np.random.Generator, canvas: int = CANVAS) -> Tensor:
    """Paint ``scene`` with positions, sizes and tilt jittered by ``rng``.

    Args:
        scene: what to paint.
        rng: source of the jitter.
        canvas: width and height in pixels; objects keep their size in pixels, so 64 has room for one object.

    Returns:
        (3, canvas, canvas) float32 in [0, 1].
    """
    if len(scene.objects) == 2 and canvas < CANVAS:
        raise ValueError(f"two objects need a canvas of {CANVAS} pixels, not {canvas}")
    axis = torch.arange(canvas, dtype=torch.float32) + 0.5
    y, x = axis[:, None].expand(canvas, canvas), axis[None, :].expand(canvas, canvas)
    image = _background(scene, x, y, rng)
    for (colour, shape), (cx, cy) in zip(scene.objects, _centres(scene, canvas, rng), strict=True):
        r = rng.uniform(21.0, 25.0)
        tilt = rng.uniform(-0.14, 0.14)
        dx, dy = x - cx, y - cy
        u, v = dx * np.cos(tilt) + dy * np.sin(tilt), dy * np.cos(tilt) - dx * np.sin(tilt)
        shadow = 0.35 * torch.sigmoid(-_distance(shape, u - 3.0, v - 4.0, r) / 1.8)
        image = image * (1 - shadow)
        body = torch.sigmoid(-_distance(shape, u, v, r) / 0.45)
        light = (1.0 - 0.16 * (dx + 1.5 * dy) / r / 2.5).clamp(0.8, 1.2)
        paint = (torch.tensor(COLOURS[colour], dtype=torch.float32)[:, None, None] / 255 * light).clamp(0, 1)
        image = image * (1 - body) + paint * body
    return image


def _background(scene: Scene, x: Tensor, y: Tensor, rng: np.random.Generator) -> Tensor:
    base = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)[:, None, None] / 255
    if scene.texture == "plain":
        return base.expand(3, *x.shape)
    period = 16.0
    px, py = rng.uniform(0, 2 * period, size=2)
    wave_x = torch.sin((x + px) * np.pi / period)
    wave = wave_x if scene.texture == "striped" else wave_x * torch.sin((y + py) * np.pi / period)
    dark = torch.sigmoid(wave * (14 if scene.texture == "checkered" else 9))
    return base * (1 - 0.28 * dark)


def _centres(scene: Scene, canvas: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    middle = canvas / 2
    if scene.relation is None:
        free = (canvas - 54) / 2 * 0.6
        return [(middle + rng.uniform(-free, free), middle + rng.uniform(-free, free))]
    sx, sy = _OFFSET[scene.relation]
    centres = []
    for sign in (1, -1):
        along, across = 29.0 + rng.uniform(-2.5, 2.5), rng.uniform(-9.0, 9.0)
        centres.append(
            (middle + sign * sx * along + (sx == 0) * across, middle + sign * sy * along + (sy == 0) * across)
        )
    return centres


def render_batch(scenes: list[Scene], rng: np.random.Generator, canvas: int = CANVAS) -> Tensor:
    """Paint several scenes: (B, 3, canvas, canvas) float32 in [0, 1]."""
    return torch.stack([render(scene, rng, canvas) for scene in scenes])
