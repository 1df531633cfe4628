"""The judge of the shipped model: a small network that reads a scene off a picture, and the score it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from atedm.tiny.pictures.judge import Judgement
from atedm.tiny.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    render_batch,
    sample_scene,
)

LAYOUTS = ("one object", "side by side", "one above the other")
_HEADS = {
    "layout": LAYOUTS,
    "colour_1": tuple(COLOURS),
    "shape_1": SHAPES,
    "colour_2": tuple(COLOURS),
    "shape_2": SHAPES,
    "background": tuple(BACKGROUNDS),
    "texture": TEXTURES,
}
ATTRIBUTES = ("count", "colour", "shape", "relation", "background", "texture")
"""What a caption is scored on; colour and shape count once per object, relation only where there are two."""


class SceneClassifier(nn.Module):
    """Reads layout, colours, shapes, background and texture off (B, 3, 128, 128) images in [0, 1].

    The first object is the left or the upper one of two.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 64)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
                for a, b in pairwise(widths)
            )
        )
        self.mix = nn.Sequential(nn.Conv2d(64, 32, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in _HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Give the logits of each head, (B, number of words)."""
        features = self.mix(self.stages(images * 2 - 1))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Scene]:
        """Say what each of (B, 3, 128, 128) images in [0, 1] shows."""
        device = next(self.parameters()).device
        chosen = {name: logits.argmax(-1).tolist() for name, logits in self(images.to(device)).items()}
        return [
            self._scene({name: _HEADS[name][values[i]] for name, values in chosen.items()}) for i in range(len(images))
        ]

    @staticmethod
    def _scene(words: dict[str, str]) -> Scene:
        objects: tuple[tuple[str, str], ...] = ((words["colour_1"], words["shape_1"]),)
        relation = None
        if words["layout"] != LAYOUTS[0]:
            objects += ((words["colour_2"], words["shape_2"]),)
            relation = "left of" if words["layout"] == LAYOUTS[1] else "above"
        return Scene(objects, words["background"], words["texture"], relation)


def canonical(scene: Scene) -> Scene:
    """Say the same scene with "left of" or "above", so that the first object is the left or upper one."""
    if scene.relation in ("right of", "below"):
        return Scene(
            scene.objects[::-1], scene.background, scene.texture, RELATIONS[RELATIONS.index(scene.relation) - 1]
        )
    return scene


def judge(asked: Scene, seen: Scene) -> Judgement:
    """Compare what a caption asked for with what a picture shows.

    Objects are paired the way that makes most of them right, so that two good objects in swapped places cost the
    relation only; a missing object costs its colour and its shape.
    """
    want, got = canonical(asked), canonical(seen)
    count = len(want.objects)
    found = got.objects + (("", ""),) * (count - len(got.objects))
    orders = [found, found[::-1]]
    scores = [[(a[0] == b[0], a[1] == b[1]) for a, b in zip(want.objects, order, strict=False)] for order in orders]
    best = max((0, 1), key=lambda i: sum(map(sum, scores[i])))  # a tie goes to the order as it stands
    right = {
        "count": int(len(got.objects) == count),
        "colour": sum(colour for colour, _ in scores[best]),
        "shape": sum(shape for _, shape in scores[best]),
        "relation": int(count == 2 and want.relation == got.relation and best == 0),
        "background": int(want.background == got.background),
        "texture": int(want.texture == got.texture),
    }
    asked_for = {"count": 1, "colour": count, "shape": count, "relation": count - 1, "background": 1, "texture": 1}
    return Judgement(right, asked_for)


def train_classifier(
    seconds: float,
    *,
    rebuild: Callable[[Tensor], Tensor] | None = None,
    batch: int = 48,
    pool: int = 12_000,
    rebuilt: int = 2000,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> SceneClassifier:
    """Train the judge on rendered scenes for a wall-clock time.

    Args:
        seconds: training time, rendering the pool left out.
        rebuild: sends images (B, 3, 128, 128) in [0, 1] through the shipped autoencoder, because every picture to be
            judged will have gone that way.
        batch: images per step; half of them are rebuilt ones.
        pool: scenes rendered ahead.
        rebuilt: how many of them are sent through ``rebuild``.
        seed: seed of scenes and weights.
        report: called now and then with a line of progress.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    scenes = [sample_scene(rng) for _ in range(pool)]
    images = torch.empty(pool, 3, CANVAS, CANVAS, dtype=torch.uint8)
    for first in range(0, pool, 32):
        some = render_batch(scenes[first : first + 32], rng)
        if rebuild is not None and first < rebuilt:
            some = rebuild(some)
        images[first : first + 32] = (some * 255).round().to(torch.uint8)
    targets = {name: torch.tensor(column) for name, column in _targets([canonical(scene) for scene in scenes]).items()}
    model = SceneClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    start, step, shown = time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * spent / seconds)))
        rows = torch.from_numpy(
            np.r_[rng.integers(0, rebuilt, size=batch // 2), rng.integers(0, pool, size=batch // 2)]
        )
        shift = tuple(int(n) for n in rng.integers(-3, 4, size=2))
        seen = (images[rows].float() / 255).roll(shift, dims=(2, 3))
        seen = (seen + 0.05 * rng.random() * torch.randn_like(seen)).clamp(0, 1)
        logits = model(seen)
        loss = torch.stack(
            [F.cross_entropy(logits[name], targets[name][rows], ignore_index=-1) for name in _HEADS]
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        if spent - shown > 15:
            shown = spent
            report(f"classifier: {spent:.0f} s, step {step}, loss {float(loss.detach()):.4f}")
    return model.eval()


def _targets(scenes: Sequence[Scene]) -> dict[str, list[int]]:
    """Return the right class of each head for each scene; -1 where there is no second object."""
    targets: dict[str, list[int]] = {name: [] for name in _HEADS}
    for scene in scenes:
        (colour, shape), *rest = scene.objects
        targets["layout"].append({None: 0, "left of": 1, "above": 2}[scene.relation])
        targets["colour_1"].append(list(COLOURS).index(colour))
        targets["shape_1"].append(SHAPES.index(shape))
        targets["colour_2"].append(list(COLOURS).index(rest[0][0]) if rest else -1)
        targets["shape_2"].append(SHAPES.index(rest[0][1]) if rest else -1)
        targets["background"].append(list(BACKGROUNDS).index(scene.background))
        targets["texture"].append(TEXTURES.index(scene.texture))
    return targets


def save_classifier(model: SceneClassifier, file: Path) -> None:
    """Write the judge as float16 safetensors."""
    save_model(model.half(), str(file))


def load_classifier(file: Path) -> SceneClassifier:
    """Read the judge back, in float32 and ready to use."""
    model = SceneClassifier().half()
    load_model(model, str(file))
    return model.float().eval()
