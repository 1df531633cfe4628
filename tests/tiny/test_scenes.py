"""The scenes: captions say what pictures show, and held-out captions stay out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atedm.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    held_out_scenes,
    render,
    sample_scene,
)


def colour_at(image: torch.Tensor, x: float, y: float) -> str:
    """Name of the object colour nearest to a pixel."""
    pixel = image[:, round(y), round(x)] * 255
    return min(COLOURS, key=lambda name: float((pixel - torch.tensor(COLOURS[name])).abs().sum()))


def test_captions_read_as_english() -> None:
    two = Scene((("orange", "circle"), ("blue", "ring")), "gray", "striped", "above")
    assert two.caption == "an orange circle above a blue ring on a striped gray background"
    assert Scene((("red", "cross"),), "pink", "plain").caption == "a red cross on a pink background"


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_first_object_stands_where_the_relation_says(relation: str) -> None:
    scene = Scene((("red", "square"), ("blue", "square")), "gray", "plain", relation)
    image = render(scene, np.random.default_rng(1))
    dx, dy = {"left of": (-29, 0), "right of": (29, 0), "above": (0, -29), "below": (0, 29)}[relation]
    assert colour_at(image, 64 + dx, 64 + dy) == "red"
    assert colour_at(image, 64 - dx, 64 - dy) == "blue"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_looks_unlike_every_other(shape: str) -> None:
    def mask(name: str) -> torch.Tensor:
        image = render(Scene((("black", name),), "pink", "plain"), np.random.default_rng(3))
        return image.mean(0) < 0.3

    areas = {name: mask(name) for name in SHAPES}
    for other in set(SHAPES) - {shape}:
        both = (areas[shape] & areas[other]).sum() / (areas[shape] | areas[other]).sum()
        assert both < 0.85, other


def test_backgrounds_and_textures_show() -> None:
    for background in BACKGROUNDS:
        plain, striped, checkered = (
            render(Scene((("red", "circle"),), background, texture), np.random.default_rng(0)) for texture in TEXTURES
        )
        corner = (slice(None), slice(0, 20), slice(0, 20))
        assert (plain[corner].mean((1, 2)) * 255 - torch.tensor(BACKGROUNDS[background])).abs().max() < 2
        # Stripes are equal down a column; a checkerboard is not.
        assert striped[:, :20, 5].std(dim=1).max() < 1e-4
        assert checkered[:, :40, 5].std(dim=1).max() > 0.02
        assert striped[:, 5, :40].std(dim=1).max() > 0.02


def test_rendering_is_repeatable_and_in_range() -> None:
    scene = sample_scene(np.random.default_rng(0))
    first, second = (render(scene, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.shape == (3, 128, 128)


def test_held_out_captions_are_never_drawn_for_training() -> None:
    rng = np.random.default_rng(0)
    training = {sample_scene(rng).caption for _ in range(3000)}
    held_out = {scene.caption for scene in held_out_scenes(300)}
    assert not training & held_out
    assert [s.caption for s in held_out_scenes(20)] == [s.caption for s in held_out_scenes(300)][:20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": (("pinkish", "circle"),)}, "unknown colour 'pinkish'"),
        ({"objects": (("red", "blob"),)}, "unknown shape 'blob'"),
        ({"background": "red"}, "unknown background"),
        ({"texture": "wavy"}, "unknown texture"),
        ({"relation": "above"}, "relation"),
        ({"objects": ()}, "one or two objects"),
        ({"objects": (("red", "ring"),) * 2, "relation": "inside"}, "unknown relation"),
    ],
)
def test_words_the_world_does_not_know_are_refused(change: dict[str, object], message: str) -> None:
    fields = {"objects": (("red", "circle"),), "background": "gray", "texture": "plain", "relation": None} | change
    with pytest.raises(ValueError, match=message):
        Scene(**fields)


def test_two_objects_do_not_fit_a_small_canvas() -> None:
    scene = Scene((("red", "square"), ("blue", "square")), "gray", "plain", "above")
    with pytest.raises(ValueError, match="128 pixels"):
        render(scene, np.random.default_rng(0), 64)
