"""Make the held-out scenes with a pipeline and let the judge score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atedm.tiny.classifier import ATTRIBUTES, Judgement, SceneClassifier, judge
from atedm.tiny.scenes import Scene

Progress = Callable[[int], None]


def make_scenes(
    pipe: Any,
    scenes: Sequence[Scene],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    batch: int = 10,
    progress: Progress | None = None,
) -> Tensor:
    """Make one image a scene; image i always starts from the same noise, whatever is pruned and however it is batched.

    Args:
        pipe: The shipped pipeline, patched or not.
        scenes: What to draw.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Image i has seed ``seed + i``.
        batch: Images made at once.
        progress: Called with the number of images made since the last call.

    Returns:
        (N, 3, H, W) uint8 on the CPU.
    """
    made = []
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        images = pipe(
            [scene.caption for scene in some],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(some))],
            output_type="np",
        ).images
        made.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
        if progress is not None:
            progress(len(some))
    return torch.cat(made)


def judge_images(judge_model: SceneClassifier, scenes: Sequence[Scene], images: Tensor) -> list[Judgement]:
    """Judge (N, 3, 128, 128) uint8 images against the scenes they were asked for."""
    seen = [scene for chunk in torch.split(images, 64) for scene in judge_model.read(chunk.float() / 255)]
    return [judge(asked, got) for asked, got in zip(scenes, seen, strict=True)]


def columns(judgements: Sequence[Judgement]) -> dict[str, tuple[list[int], list[int]]]:
    """Collect (right, asked) per caption for each attribute, and for "all" of them at once."""
    table = {name: ([j.right[name] for j in judgements], [j.asked[name] for j in judgements]) for name in ATTRIBUTES}
    return {**table, "all": ([int(j.all_right) for j in judgements], [1] * len(judgements))}


def psnr_each(images: Tensor, reference: Tensor) -> list[float]:
    """PSNR in dB of each (3, H, W) uint8 image to its reference, capped at 99 where they are equal."""
    error = (images.float() - reference.float()).square().flatten(1).mean(dim=1).clamp_min(255**2 * 10**-9.9)
    return (10 * torch.log10(255**2 / error)).tolist()
