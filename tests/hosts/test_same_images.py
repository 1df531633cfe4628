"""The images of the shipped model stay what they are: pixels by every method, as they were before the first refactor.

The references are drawn by the code of that time. `python tests/hosts/test_same_images.py` draws them anew, for when
the shipped model or a method changes on purpose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import atedm
from atedm.tiny.scenes import held_out_scenes

DATA = Path(__file__).parents[1] / "data"
ABOUT = DATA / "same-images.json"
METHODS = ("paper", "dagger", "turbo", "matched")
STEPS, SIDE, COLUMNS, IMAGES = 6, 128, 4, 8


def sheet_of(method: str) -> Path:
    return DATA / f"same-images-{method}.png"


def where_drawn() -> dict[str, str]:
    """What the last digits of an image depend on."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = ("model name", "cpu family", "model", "stepping")
    return {
        "processor": " ".join(cpu.get(name, "").lstrip("\t: ") for name in names),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }


def pipeline() -> Any:
    pipe = atedm.load_pipeline("tiny", device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, method: str) -> np.ndarray:
    """Images of the first held-out captions, in one sheet."""
    with atedm.pruned(pipe, method):
        images = pipe(
            [scene.caption for scene in held_out_scenes(IMAGES)],
            num_inference_steps=STEPS,
            width=SIDE,
            height=SIDE,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(IMAGES)],
        ).images
    pixels = np.stack([np.asarray(image) for image in images]).reshape(-1, COLUMNS, SIDE, SIDE, 3)
    return pixels.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * SIDE, 3)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.mark.parametrize("method", METHODS)
def test_pixels_are_those_of_before(pipe: Any, method: str) -> None:
    expected = np.asarray(Image.open(sheet_of(method)))
    found = drawn(pipe, method)
    assert found.shape == expected.shape
    if where_drawn() == json.loads(ABOUT.read_text()):
        assert np.array_equal(found, expected)
    else:
        apart = np.abs(found.astype(int) - expected)
        assert (apart > 2).mean() < 0.03


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in METHODS:
        Image.fromarray(drawn(pipeline(), name)).save(sheet_of(name), optimize=True)
    ABOUT.write_text(json.dumps(where_drawn(), indent=2) + "\n")
