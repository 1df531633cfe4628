"""The judge: reads rendered scenes right, and scores what it reads as the docstring says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from atedm.app.models import load_pipeline
from atedm.tiny import weights_folder
from atedm.tiny.classifier import canonical, judge, load_classifier, save_classifier
from atedm.tiny.pictures.judge import Judgement, accuracy
from atedm.tiny.scenes import Scene, held_out_scenes, render_batch


def scene(first: str, second: str, relation: str, background: str = "gray", texture: str = "plain") -> Scene:
    objects = tuple((text.split()[0], text.split()[1]) for text in (first, second))
    return Scene(objects, background, texture, relation)


def test_the_same_scene_said_two_ways_is_one() -> None:
    assert canonical(scene("red circle", "blue ring", "below")) == scene("blue ring", "red circle", "above")
    assert canonical(scene("red circle", "blue ring", "right of")) == scene("blue ring", "red circle", "left of")
    assert judge(scene("red circle", "blue ring", "below"), scene("blue ring", "red circle", "above")).all_right


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (scene("red circle", "blue ring", "above"), (2, 2, 1)),
        (scene("blue ring", "red circle", "above"), (2, 2, 0)),  # swapped places cost the relation only
        (scene("red circle", "blue ring", "left of"), (2, 2, 0)),
        (scene("red square", "blue ring", "above"), (2, 1, 1)),
        (scene("green circle", "blue ring", "above"), (1, 2, 1)),
        (Scene((("red", "circle"),), "gray", "plain"), (1, 1, 0)),  # a missing object costs all it had
        (Scene((("blue", "ring"),), "gray", "plain"), (1, 1, 0)),
    ],
)
def test_scores_of_colour_shape_and_relation(seen: Scene, right: tuple[int, int, int]) -> None:
    judged = judge(scene("red circle", "blue ring", "above"), seen)
    assert (judged.right["colour"], judged.right["shape"], judged.right["relation"]) == right
    assert judged.all_right == (right == (2, 2, 1))


def test_an_extra_object_is_not_all_right() -> None:
    asked = Scene((("red", "circle"),), "gray", "plain")
    assert not judge(asked, scene("red circle", "blue ring", "above")).all_right


def test_background_and_texture_count_once() -> None:
    judged = judge(
        scene("red circle", "blue ring", "above"), scene("red circle", "blue ring", "above", "pink", "striped")
    )
    assert judged.right["background"] == judged.right["texture"] == 0


def test_accuracy_is_the_share_right() -> None:
    full = judge(scene("red circle", "blue ring", "above"), scene("red circle", "blue ring", "above"))
    none = Judgement(dict.fromkeys(full.right, 0), full.asked)
    assert accuracy([full, none, none, none]) == dict.fromkeys([*full.right, "all"], 0.25)
    with pytest.raises(ValueError, match="no judgements"):
        accuracy([])


@torch.inference_mode()
def test_the_shipped_judge_reads_held_out_scenes_through_the_shipped_autoencoder() -> None:
    model = load_classifier(weights_folder() / "classifier.safetensors")
    scenes = held_out_scenes(60, seed=5)
    images = render_batch(scenes, np.random.default_rng(5))
    vae = load_pipeline("tiny", device="cpu").vae
    rebuilt = torch.cat([vae.decode(vae.encode(c * 2 - 1).latents).sample / 2 + 0.5 for c in images.split(30)])
    for pictures in (images, rebuilt.clamp(0, 1)):
        right = accuracy([judge(a, b) for a, b in zip(scenes, model.read(pictures), strict=True)])
        assert min(right.values()) >= 0.97, right


def test_a_saved_judge_reads_the_same(tmp_path: Path) -> None:
    model = load_classifier(weights_folder() / "classifier.safetensors")
    save_classifier(load_classifier(weights_folder() / "classifier.safetensors"), tmp_path / "judge.safetensors")
    images = render_batch(held_out_scenes(4), np.random.default_rng(0))
    assert load_classifier(tmp_path / "judge.safetensors").read(images) == model.read(images)
