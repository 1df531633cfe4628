"""Faults that tests inject: kills, full disks, too little memory; and children to inject them into.

A child is forked, so that it starts in no time with everything imported, and can be killed, starved or limited without
harm to the tests. `ATEDM_FAULTS=250 pytest -n 0 -s -k fault` injects about as many faults; CI injects fewer.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors import safe_open

FAULTS = int(os.environ.get("ATEDM_FAULTS", "25"))
MOMENTS = ("before", "half", "after")
Before = Callable[[], None]
TOO_LONG = 300.0
"""Seconds after which a child hangs."""


def faults(kind: str, share: float) -> Iterator[random.Random]:
    """Yield a source of chance for each fault of a kind, which are a share of all."""
    for number in range(max(2, round(share * FAULTS))):
        yield random.Random(f"{kind} {number}")


def killed(work: Callable[[], object], writes: int, seconds: float, chance: random.Random) -> None:
    """Run ``work`` in a child that is killed at one of its writes or at any moment, if it is not quicker."""
    if chance.random() < 0.5:
        before = killed_at_write(chance.randrange(writes), chance.choice(MOMENTS))
        child, kill_after = in_child(lambda: (before(), work())), None  # type: ignore[func-returns-value]
    else:
        child, kill_after = in_child(work), chance.uniform(0, seconds)
    assert ended(child, kill_after) in (0, -9)


def in_child(work: Callable[[], object]) -> int:
    """Start ``work`` in a child of this process and return its number; it ends with 0, or 1 and a trace."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, kill_after: float | None = None) -> int:
    """Wait for a child, or kill it after so many seconds if it still runs; return its status, -9 if killed."""
    over = time.monotonic() + (TOO_LONG if kill_after is None else kill_after)
    while time.monotonic() < over:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert kill_after is not None, f"a child still ran after {TOO_LONG} s"
    return status


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def in_one_line(self) -> bool:
        """Whether it was ended by what the user got wrong, said in one line."""
        lines = self.err.strip().splitlines()
        return self.status == 2 and lines[-1].startswith("atedm: ") and "Traceback" not in self.err


def command(*words: object, folder: Path, before: Before | None = None) -> Said:
    """Run the command line in a child, in ``folder``, after something was done to it."""
    files = folder / ".said-out", folder / ".said-err"

    def work() -> None:
        from atedm.cli import main

        for number, file in zip((1, 2), files, strict=True):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        sys.argv = ["atedm", *map(str, words)]
        os.chdir(folder)
        if before is not None:
            before()
        main()

    status = ended(in_child(work))
    out, err = (file.read_text() for file in files)
    for file in files:
        file.unlink()
    return Said(status, out, err)


def killed_at_write(number: int, moment: str) -> Before:
    """Kill the process at its n-th file: "before" it gets its name, "after", or when "half" of it is written."""

    def before() -> None:
        left = number
        rename = os.replace

        def replaced(source: os.PathLike[str], target: os.PathLike[str]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                if moment == "half":
                    os.truncate(source, Path(source).stat().st_size // 2)
                if moment == "after":
                    rename(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replaced  # type: ignore[assignment]

    return before


def largest_file(size: int) -> Before:
    """Let no file grow past ``size`` bytes: writing on is an error, as on a full disk."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def memory_left(size: int) -> Before:
    """Leave so many bytes of address space beyond what is mapped."""

    def before() -> None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))

    return before


def broken(content: bytes, chance: random.Random) -> bytes:
    """Return a file's content after something happened to it: cut, zeroed, overwritten, or something else entirely."""
    how = chance.choice(["cut", "empty", "zeros", "noise", "other"])
    if how == "cut":
        return content[: chance.randrange(max(1, len(content) - 1))]
    if how == "empty":
        return b""
    if how == "zeros":
        return bytes(len(content))
    if how == "noise":
        start = chance.randrange(max(1, len(content) // 2))
        return content[:start] + chance.randbytes(max(1, len(content) - start))
    return chance.choice(
        [b"[]", b"null", b'{"a": 1}', b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"version https://git"]
    )


def pictures(folder: Path) -> dict[str, bytes]:
    """Return the PNGs of a folder by their names in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.png")}


def whole_files(folder: Path) -> Iterator[Path]:
    """Yield every file that has its final name, after it has been read to its end."""
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name.endswith(".partial"):
            continue
        if file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                assert list(tensors.keys())
        else:
            assert file.read_bytes()
        yield file
