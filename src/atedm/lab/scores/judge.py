"""Caption accuracy: the judge of the shipped model reads every image back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atedm.tiny import weights_folder
from atedm.tiny.classifier import ATTRIBUTES, Judgement, judge, load_classifier
from atedm.tiny.scenes import Scene

ALL = "all"
"""Everything that a caption says at once."""


def judge_images(scenes: Sequence[Scene], images: Tensor) -> list[Judgement]:
    """Judge (N, 3, 128, 128) uint8 images against the N scenes they were drawn from."""
    reader = load_classifier(weights_folder() / "classifier.safetensors")
    seen = [scene for chunk in torch.split(images, 64) for scene in reader.read(chunk.float() / 255)]
    return [judge(asked, got) for asked, got in zip(scenes, seen, strict=True)]


def columns(judgements: Sequence[Judgement]) -> dict[str, tuple[list[int], list[int]]]:
    """Collect (right, asked) per caption for each attribute, and for `ALL` of them at once."""
    table = {name: ([j.right[name] for j in judgements], [j.asked[name] for j in judgements]) for name in ATTRIBUTES}
    return {**table, ALL: ([int(j.all_right) for j in judgements], [1] * len(judgements))}
