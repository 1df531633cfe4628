"""Real pictures that images are held against, for FID."""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from atedm.files import read_json, save_image, save_json
from atedm.lab.evaluation.images import SETTINGS, image_file
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.scores.pixels import read_picture
from atedm.tiny.download import load_atlas, objects_folder
from atedm.tiny.rendering import Atlas, render


def write_references(prompts: Sequence[Prompt], folder: Path, size: tuple[int, int], seed: int = 0) -> Iterator[int]:
    """Write one picture of ``size`` (width, height) a prompt, PNGs named by number, and yield the number after each.

    MS-COCO is cropped to the middle and resized, as the paper does; scenes are rendered, with places by ``seed``.
    Pictures of the same prompts, size and seed that are there already stay; others are replaced. Every prompt has a
    picture, or is a scene. Raises a `ValueError` that names a picture which cannot be read, or as `load_objects`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    checksums = [zlib.crc32(repr((one.text, one.scene, str(one.picture))).encode()) for one in prompts]
    asked: dict[str, Any] = {"size": list(size), "seed": seed, "prompts": checksums}
    stored = read_json(file) if file.exists() else {}
    same = stored.get("size") == asked["size"] and stored.get("seed") == seed
    pairs = zip(stored.get("prompts", []) if same else [], checksums, strict=False)
    shared = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
    if shared < len(prompts):  # until all are there, the file vouches for those only
        save_json(asked | {"prompts": checksums[:shared]}, file)
    for index, prompt in enumerate(prompts):
        if index >= shared or not image_file(folder, index).exists():
            save_image(_reference(prompt, size, [seed, index]), image_file(folder, index))
        yield index
    if shared < len(prompts):
        save_json(asked, file)


@cache
def load_objects() -> Atlas:
    """Return the pictures that scenes are rendered from; they are fetched once.

    Raises a `FileNotFoundError` if they are neither here nor to be had.
    """
    return load_atlas(objects_folder())


def _reference(prompt: Prompt, size: tuple[int, int], seed: list[int]) -> Image.Image:
    if prompt.scene is not None:
        pixels = render([prompt.scene], load_objects(), np.random.default_rng(seed)).images[0].permute(1, 2, 0)
        return Image.fromarray((pixels * 255).round().byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    assert prompt.picture is not None
    return ImageOps.fit(read_picture(prompt.picture), size)
