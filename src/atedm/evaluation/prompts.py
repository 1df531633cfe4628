"""What is drawn, and what it is held against: scenes, a file of prompts, or MS-COCO."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from atedm.files import read_json, save_image, save_json
from atedm.tiny.scenes import Scene, held_out_scenes, render

SCENES = "scenes"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Prompt:
    """One line to draw."""

    text: str
    #: What it means, if it is a scene and a judge can read it back.
    scene: Scene | None = None
    #: A real picture it describes.
    picture: Path | None = None


def read_prompts(source: str, count: int | None = None, seed: int = 0, *, at_most: int | None = None) -> list[Prompt]:
    """Read prompts from where ``source`` says.

    Args:
        source: "scenes" for held-out captions of the scenes that the shipped model draws; a text file of a prompt a
            line; a CSV file with a column "prompt" or "caption"; or a folder of MS-COCO, with
            ``annotations/captions_*.json`` and the pictures of that split beside.
        count: How many, from the first; None takes all, or 500 scenes.
        seed: Which scenes.
        at_most: How many where no ``count`` is given; a file may hold fewer.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If there are no prompts in it, or fewer than ``count``.
    """
    if count is not None and count < 1:
        raise ValueError(f"captions must be at least 1, not {count}")
    if source == SCENES:
        return [Prompt(scene.caption, scene) for scene in held_out_scenes(count or at_most or 500, seed)]
    path = Path(source).expanduser()
    if path.is_dir():
        prompts = _read_coco(path)
    elif path.is_file():
        prompts = [Prompt(text) for text in _read_lines(path)]
    else:
        raise FileNotFoundError(f"no prompts at {source!r}; give 'scenes', a .txt or .csv file, or a folder of MS-COCO")
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    if count is not None and len(prompts) < count:
        raise ValueError(f"{source} holds {len(prompts)} prompts, fewer than the {count} asked for")
    return prompts[: count or at_most]


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    if file.suffix.lower() != ".csv":
        # Not at every sign that Unicode takes for the end of a line, which a prompt may hold.
        return [line.strip() for line in text.split("\n") if line.strip()]
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names, content = [*(rows.fieldnames or ())], [*rows]
    except csv.Error as error:
        raise ValueError(f"{file} is no CSV: {error}") from error
    column = next((name for name in names if name.strip().lower() in ("prompt", "caption")), None)
    if column is None:
        raise ValueError(f"{file} has no column 'prompt' or 'caption', but {', '.join(names)[:200] or 'nothing'}")
    texts = (" ".join((row[column] or "").split()) for row in content)
    return [text for text in texts if text]


def _read_coco(folder: Path) -> list[Prompt]:
    """One caption a picture, the first by its number, as the paper deduplicates them (supplement A.4)."""
    files = sorted((folder / "annotations").glob("captions_*.json"))
    if not files:
        raise ValueError(f"{folder} is no folder of MS-COCO: no annotations/captions_*.json")
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ImportError("MS-COCO is read by pycocotools: pip install 'atedm[evaluate]'") from error
    file = next((f for f in files if "val" in f.stem), files[0])
    pictures = folder / file.stem.removeprefix("captions_")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress there
            coco = COCO(str(file))
        named = [(image_id, Path(coco.imgs[image_id]["file_name"])) for image_id in sorted(coco.getImgIds())]
        captions = {image_id: coco.loadAnns(sorted(coco.getAnnIds(imgIds=image_id))) for image_id, _ in named}
        worded = {
            i: [text for one in found if (text := " ".join(one["caption"].split()))] for i, found in captions.items()
        }
        texts = {image_id: found[0] for image_id, found in worded.items() if found}
        places = {image_id: pictures / name for image_id, name in named if image_id in texts}
        there = {image_id for image_id, place in places.items() if place.is_file()}
    except Exception as error:  # whatever the package comes upon in a file that is none
        raise ValueError(f"{file} is no caption file of MS-COCO: {type(error).__name__}: {error}") from error
    # By the names alone: that a picture is a link to elsewhere is the user's own doing.
    if outside := [name for _, name in named if name.is_absolute() or ".." in name.parts]:
        raise ValueError(f"{file} names a picture outside of its folder: {outside[0]}")
    prompts = [Prompt(texts[image_id], picture=place) for image_id, place in places.items() if image_id in there]
    if places and not prompts:
        raise ValueError(f"{file.name} has captions of {len(places)} pictures, but none of them is in {pictures}")
    return prompts


def write_references(prompts: Sequence[Prompt], folder: Path, size: tuple[int, int], seed: int = 0) -> Iterator[int]:
    """Write the real pictures that images are held against, PNGs named by number, and yield after each.

    MS-COCO is cropped to the middle and resized, as the paper does; scenes are rendered with jitter from ``seed``.
    Those of the same prompts, size and seed that are there already stay; others make room.

    Args:
        prompts: All with a picture, or all scenes.
        folder: Made if missing.
        size: (width, height) in pixels.
        seed: Of the jitter of scenes.

    Raises:
        ValueError: If a prompt has nothing to hold against, or a picture cannot be read; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    asked: dict[str, Any] = {"size": list(size), "seed": seed, "prompts": [_checksum(prompt) for prompt in prompts]}
    stored = read_json(file) if file.exists() else {}
    same = stored.get("size") == asked["size"] and stored.get("seed") == seed
    before = stored.get("prompts", []) if same else []
    pairs = zip(before, asked["prompts"], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared < len(prompts):  # until all are there, it vouches for those only
        save_json(asked | {"prompts": asked["prompts"][:shared]}, file)
    for index, prompt in enumerate(prompts):
        picture = folder / f"{index:05d}.png"
        if index >= shared or not picture.exists():
            save_image(_reference(prompt, size, [seed, index]), picture)
        yield index
    if shared < len(prompts):
        save_json(asked, file)


def _checksum(prompt: Prompt) -> int:
    return zlib.crc32(repr((prompt.text, prompt.scene, str(prompt.picture))).encode())


def _reference(prompt: Prompt, size: tuple[int, int], seed: list[int]) -> Image.Image:
    if prompt.scene is not None:
        pixels = render(prompt.scene, np.random.default_rng(seed)).permute(1, 2, 0)
        return Image.fromarray((pixels * 255).round().byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    if prompt.picture is None:
        raise ValueError(f"there is no picture to hold {prompt.text!r} against")
    try:
        with Image.open(prompt.picture) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {prompt.picture}: {error}") from error
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
