"""Scores of a plan's images beside their distance in pixels, by networks whose weights are at hand."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from atedm.lab.extra import optional
from atedm.lab.scores.clip_score import CLIP_MODEL, CLIP_WEIGHTS, TINY_CLIP, clip_scores, open_clip_model
from atedm.lab.scores.pixels import lpips_distances
from atedm.plans.plan import Plan
from atedm.tiny import SHIPPED
from atedm.tuning.drawing import Easel


def further_scores(easel: Easel, plan: Plan) -> dict[str, float]:
    """Return the mean LPIPS to the dense images and the mean CLIP scores of both, as a plan keeps them.

    Nothing is downloaded: a score is left out where its package or its weights are not here.
    """
    ours, dense = (easel.files(one, len(easel.prompts)) for one in (plan, easel.dense))
    device, found = str(easel.pipe.device), {}
    if _has_alexnet():
        with suppress(ImportError, ValueError):
            found["lpips"] = _mean(lpips_distances(ours, dense, device=device))
    if (model := _clip_at_hand(str(easel.dense.model["name"]))) is not None:
        try:
            clip = open_clip_model(model, device=device)
        except (ImportError, ValueError):
            return found
        found["clip_score"] = _mean(clip_scores(clip, ours, easel.prompts))
        found["dense_clip_score"] = _mean(clip_scores(clip, dense, easel.prompts))
    return found


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def _has_alexnet() -> bool:
    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth"))


def _clip_at_hand(model: str) -> str | None:
    """Name the CLIP model that knows what ``model`` draws, if its weights are here."""
    if model in SHIPPED:
        return TINY_CLIP
    try:
        repository = optional("open_clip").get_pretrained_cfg(CLIP_MODEL, CLIP_WEIGHTS)["hf_hub"].strip("/")
    except ImportError:
        return None
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return CLIP_MODEL if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names) else None
