"""Files appear under their name whole or not at all, and errors name the file that is broken."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes ``file`` at the end. If anything goes wrong, nothing is left.

    The folder is made if missing. A process that is killed leaves a hidden file that ends in ".partial". A link stays a
    link, and its target is written. A pipe or a device is written directly, because it cannot be replaced.

    Raises:
        OSError: If it cannot be written; the message names ``file``.
    """
    target = Path(os.path.realpath(file))
    is_stream = target.exists() and not target.is_file() and not target.is_dir()
    partial = target if is_stream else target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if not is_stream:
            partial.replace(target)
    except BaseException as error:
        if not is_stream:
            with suppress(OSError):  # if the folder itself is at fault, the first error is the one to tell
                partial.unlink()
        if isinstance(error, OSError):
            raise OSError(f"cannot write {file}: {error.strerror or error}") from error
        raise


def check_writable(*files: Path | None) -> None:
    """Check before long work that its results can be written. None is a file that was not asked for.

    Raises:
        ValueError: If two are the same.
        OSError: As `written_whole`.
    """
    named = [file for file in files if file is not None]
    for index, file in enumerate(named):
        if any(os.path.realpath(file) == os.path.realpath(other) for other in named[:index]):
            raise ValueError(f"{file} is named for two results; give each a file of its own")
        if file.is_dir():
            raise IsADirectoryError(f"cannot write {file}: it is a folder")
        with suppress(_NothingToWrite), written_whole(file) as partial:
            partial.touch()
            raise _NothingToWrite


class _NothingToWrite(Exception):
    """Leaves `written_whole` without a file."""


def save_image(image: Image.Image, file: Path) -> None:
    """Write a PNG."""
    with written_whole(file) as partial:
        image.save(partial, format="PNG")


def save_json(content: Any, file: Path) -> None:
    """Write JSON."""
    save_text(json.dumps(content, indent=2) + "\n", file)


def save_text(text: str, file: Path) -> None:
    """Write text in UTF-8."""
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(file: Path, kind: type[Any] = dict, *, advice: str = "remove it, and the next run makes it again") -> Any:
    """Read a JSON file that a run of ours wrote and that holds a ``kind``.

    Raises:
        ValueError: If it is something else; the message names it and gives ``advice``.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); {advice}") from error
    if not isinstance(content, kind):
        found = type(content).__name__
        raise ValueError(f"{file} holds a {found}, not what a run writes; {advice}")
    return content


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder. What others are writing stays. Needs psutil."""
    import psutil

    for partial in folder.glob(".*.partial"):
        writer = partial.name.split(".")[-2]
        if not writer.isdecimal() or int(writer) == os.getpid() or not psutil.pid_exists(int(writer)):
            with suppress(OSError):
                partial.unlink()
