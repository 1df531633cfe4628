"""What is drawn, and what it is held against: scenes, a file of prompts, or MS-COCO."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from atedm.files import save_image
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


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> list[Prompt]:
    """Read prompts from where ``source`` says.

    Args:
        source: "scenes" for held-out captions of the scenes that the shipped model draws; a text file of a prompt a
            line; a CSV file with a column "prompt" or "caption"; or a folder of MS-COCO, with
            ``annotations/captions_*.json`` and the pictures of that split beside.
        count: How many, from the first; None takes all, or 500 scenes.
        seed: Which scenes.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If there are no prompts in it, or fewer than ``count``.
    """
    if count is not None and count < 1:
        raise ValueError(f"captions must be at least 1, not {count}")
    if source == SCENES:
        return [Prompt(scene.caption, scene) for scene in held_out_scenes(count or 500, seed)]
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
    return prompts[:count]


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    if file.suffix.lower() != ".csv":
        return [line.strip() for line in text.splitlines() if line.strip()]
    rows = csv.DictReader(text.splitlines())
    column = next(
        (name for name in rows.fieldnames or () if name and name.strip().lower() in ("prompt", "caption")), None
    )
    if column is None:
        raise ValueError(
            f"{file} has no column 'prompt' or 'caption', but {', '.join(map(str, rows.fieldnames or ()))}"
        )
    return [row[column].strip() for row in rows if (row[column] or "").strip()]


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
    try:
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress there
            coco = COCO(str(file))
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{file} is no caption file of MS-COCO: {error}") from error
    pictures = folder / file.stem.removeprefix("captions_")
    prompts, missing = [], 0
    for image_id in sorted(coco.getImgIds()):
        captions = coco.loadAnns(sorted(coco.getAnnIds(imgIds=image_id)))
        picture = pictures / coco.imgs[image_id]["file_name"]
        if not captions:
            continue
        if not picture.exists():
            missing += 1
            continue
        prompts.append(Prompt(" ".join(captions[0]["caption"].split()), picture=picture))
    if missing and not prompts:
        raise ValueError(f"{file.name} has captions of {missing} pictures, but none of them is in {pictures}")
    return prompts


def write_references(prompts: Sequence[Prompt], folder: Path, size: tuple[int, int], seed: int = 0) -> Iterator[int]:
    """Write the real pictures that images are held against, PNGs named by number, and yield after each.

    MS-COCO is cropped to the middle and resized, as the paper does; scenes are rendered with jitter from ``seed``.
    Those that are there already stay.

    Args:
        prompts: All with a picture, or all scenes.
        folder: Made if missing.
        size: (width, height) in pixels.
        seed: Of the jitter of scenes.

    Raises:
        ValueError: If a prompt has nothing to hold against, or a picture cannot be read; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(prompts):
        file = folder / f"{index:05d}.png"
        if not file.exists():
            save_image(_reference(prompt, size, [seed, index]), file)
        yield index


def _reference(prompt: Prompt, size: tuple[int, int], seed: list[int]) -> Image.Image:
    if prompt.scene is not None:
        pixels = render(prompt.scene, np.random.default_rng(seed)).permute(1, 2, 0)
        return Image.fromarray((pixels * 255).round().byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    if prompt.picture is None:
        raise ValueError(f"there is no picture to hold {prompt.text!r} against")
    try:
        with Image.open(prompt.picture) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the picture {prompt.picture}: {error}") from error
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
