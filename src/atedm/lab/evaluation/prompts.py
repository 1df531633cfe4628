"""What is drawn: scenes, a file of prompts, or the captions of MS-COCO."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import Scene, held_out_scenes

SCENES = "scenes"


@dataclass(frozen=True)
class Prompt:
    """One line to draw."""

    text: str
    scene: Scene | None = None  #: What it means, if it is a scene and the judge can read it back.
    picture: Path | None = None  #: A real picture it describes.

    @property
    def has_reference(self) -> bool:
        """Whether there is a real picture of it, which FID needs."""
        return self.scene is not None or self.picture is not None


def read_prompts(
    source: str,
    count: int | None = None,
    seed: int = 0,
    *,
    at_most: int | None = None,
    objects: Sequence[str] = tuple(OBJECTS),
) -> list[Prompt]:
    """Read the first ``count`` prompts, by default all or 500 scenes; ``seed`` says which scenes.

    ``source`` is "scenes" for held-out captions of the scenes that the shipped models draw, of ``objects``; a text file
    of a prompt a line; a CSV file with a column "prompt" or "caption"; or a folder of MS-COCO, with
    ``annotations/captions_*.json`` and the pictures of that split beside. Where no ``count`` is given, ``at_most`` so
    many are read.

    Raises a `FileNotFoundError` if it is not there, and a `ValueError` if there are no prompts in it, or fewer than
    ``count``.
    """
    if count is not None and count < 1:
        raise ValueError(f"captions must be at least 1, not {count}")
    if source == SCENES:
        return [Prompt(scene.caption, scene) for scene in held_out_scenes(count or at_most or 500, seed, objects)]
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
        # Not at every sign that Unicode takes for the end of a line: a prompt may hold such.
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
    file = next((f for f in files if "val" in f.stem), files[0])
    try:
        content = json.loads(file.read_bytes())
        names = {image["id"]: Path(image["file_name"]) for image in content["images"]}
        captions: dict[int, str] = {}
        for one in sorted(content["annotations"], key=lambda one: int(one["id"])):
            if text := " ".join(one["caption"].split()):
                captions.setdefault(one["image_id"], text)
        described = {number: name for number, name in sorted(names.items()) if number in captions}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no caption file of MS-COCO: {type(error).__name__}: {error}") from error
    # By the names alone: that a picture is a link to elsewhere is the user's own doing.
    if outside := [name for name in names.values() if name.is_absolute() or ".." in name.parts]:
        raise ValueError(f"{file} names a picture outside of its folder: {outside[0]}")
    pictures = folder / file.stem.removeprefix("captions_")
    prompts = [Prompt(captions[n], picture=pictures / name) for n, name in described.items()]
    there = [prompt for prompt in prompts if prompt.picture is not None and prompt.picture.is_file()]
    if prompts and not there:
        raise ValueError(f"{file.name} has captions of {len(prompts)} pictures, but none of them is in {pictures}")
    return there
