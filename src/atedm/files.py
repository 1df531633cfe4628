"""Files appear under their name whole or not at all, and one that is broken is called by its name."""

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
    """Give a path to write to, which becomes ``file`` at the end; whatever goes wrong on the way leaves nothing.

    The folder is made if missing. A process that is killed leaves a hidden file that ends in ".partial". A link stays
    one, and what it leads to is written; a pipe or a device takes what comes, because it cannot be replaced.

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
        # Where the folder itself is at fault there is nothing to remove, and the first error is the one to tell.
        if not is_stream:
            _remove(partial)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {file}: {error.strerror or error}") from error
        raise


def check_writable(*files: Path | None) -> None:
    """See before long work that its results can be written; None is a file that was not asked for.

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
        with suppress(_Checked), written_whole(file) as partial:
            partial.touch()
            raise _Checked


class _Checked(Exception):
    """What `written_whole` is left by where nothing is to be written yet."""


def save_image(image: Image.Image, file: Path) -> None:
    """Write a PNG.

    Raises:
        OSError: As `written_whole`.
    """
    with written_whole(file) as partial:
        image.save(partial, format="PNG")


def save_json(content: Any, file: Path) -> None:
    """Write JSON.

    Raises:
        OSError: As `written_whole`.
    """
    save_text(json.dumps(content, indent=2) + "\n", file)


def save_text(text: str, file: Path) -> None:
    """Write text in UTF-8.

    Raises:
        OSError: As `written_whole`.
    """
    with written_whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(file: Path, kind: type[Any] = dict, *, advice: str = "remove it, and the next run makes it again") -> Any:
    """Read a file that a run of ours wrote and that holds a ``kind``.

    Args:
        file: What to read.
        kind: What it holds.
        advice: What to do about one that is something else.

    Raises:
        ValueError: If it is something else; the message names it.
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
    """Remove what killed processes left half-written in a folder, and leave what others are writing."""
    import psutil

    for partial in folder.glob(".*.partial"):
        writer = partial.name.split(".")[-2]
        if not writer.isdecimal() or int(writer) == os.getpid() or not psutil.pid_exists(int(writer)):
            _remove(partial)


def _remove(partial: Path) -> None:
    try:
        partial.unlink()
    except OSError:
        return
