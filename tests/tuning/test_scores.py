"""Scores beside a plan's distance: of the right images, by networks that are here, and never downloaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from atedm.app.models import load_pipeline
from atedm.files import save_image
from atedm.lab.evaluation.images import image_file
from atedm.lab.scores.clip_score import TINY_CLIP, clip_scores, open_clip_model
from atedm.lab.scores.pixels import lpips_distances
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Plan
from atedm.tuning.drawing import Easel
from atedm.tuning.scores import further_scores
from lpips_weights import keep_random_alexnet

PROMPTS = ("a duck by the sea", "a castle in the snow")


@pytest.fixture
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


@pytest.fixture
def easel(pipe: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Easel:
    """With the pictures of both plans there already, so that nothing is drawn."""
    dense = Plan({"name": getattr(request, "param", "tiny"), **fingerprint(pipe)}, 2)
    made = Easel(pipe, PROMPTS, dense, 0, tmp_path / "images")
    rng = np.random.default_rng(0)
    for plan in (dense, Plan(dense.model, 1)):
        for index in range(2):
            picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            save_image(picture, image_file(made.folder_of(plan), index))
    return made


def test_both_are_those_of_the_lab(easel: Easel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_random_alexnet(tmp_path / "torch", monkeypatch)
    plan = Plan(easel.dense.model, 1)
    ours, dense = easel.files(plan, 2), easel.files(easel.dense, 2)
    clip = open_clip_model(TINY_CLIP, device="cpu")
    assert further_scores(easel, plan) == {
        "lpips": round(sum(lpips_distances(ours, dense, device="cpu")) / 2, 5),
        "clip_score": round(sum(clip_scores(clip, ours, PROMPTS)) / 2, 5),
        "dense_clip_score": round(sum(clip_scores(clip, dense, PROMPTS)) / 2, 5),
    }


@pytest.mark.parametrize("easel", ["someone/model"], indirect=True)
def test_what_is_not_here_is_left_out(easel: Easel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert further_scores(easel, Plan(easel.dense.model, 1)) == {}
