"""Caption accuracy: the judge of the shipped model reads every image back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atedm.tiny import weights_folder
from atedm.tiny.classifier import ATTRIBUTES, judge, load_classifier
from atedm.tiny.scenes import Scene

ALL = "all"
"""Everything that a caption says at once."""


def caption_accuracy(scenes: Sequence[Scene], images: Tensor) -> dict[str, tuple[list[int], list[int]]]:
    """Judge (N, 3, 128, 128) uint8 images against the N scenes they were drawn from.

    Returns:
        By attribute, and for `ALL` of them, how much of each caption is right and how much it asks for.
    """
    reader = load_classifier(weights_folder() / "classifier.safetensors")
    seen = [scene for chunk in torch.split(images, 64) for scene in reader.read(chunk.float() / 255)]
    found = [judge(asked, got) for asked, got in zip(scenes, seen, strict=True)]
    table = {name: ([one.right[name] for one in found], [one.asked[name] for one in found]) for name in ATTRIBUTES}
    return {**table, ALL: ([int(one.all_right) for one in found], [1] * len(found))}
