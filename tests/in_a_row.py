"""Draw many images in a row with one pruned pipeline, and watch the memory of the process.

PYTHONPATH=tests .venv/bin/python tests/in_a_row.py 2000 docs/images/in-a-row.png
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import atedm
from atedm import METHODS
from atedm.app.models import load_pipeline

SIZES = ((128, 128), (128, 128), (96, 160), (128, 128))
"""Pixels, in turn: what was remembered of one size must not stay when the next comes."""


class InARow(NamedTuple):
    """What was seen."""

    #: MiB the process held, by number of images.
    memory: dict[int, float]
    #: Largest difference of the last image to the first, which were asked for alike.
    drift: float
    #: Seconds an image took, by number of images, mean of those since the number before.
    seconds: dict[int, float]


def held() -> float:
    """MiB of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def in_a_row(pipe: Any, count: int, every: int, tell: Callable[[int, float], None] | None = None) -> InARow:
    """Draw ``count`` images by every method in turn, patched anew for every ``every`` of them."""

    def draw(seed: int, size: tuple[int, int]) -> Tensor:
        images: Tensor = pipe(
            "a butterfly above a rose",
            num_inference_steps=2,
            guidance_scale=3.0,
            width=size[0],
            height=size[1],
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        return images

    methods = [*METHODS]
    with atedm.pruned(pipe, methods[0]):
        first = draw(0, SIZES[0])
    memory, seconds, start = {}, {}, time.perf_counter()
    for begin in range(0, count, every):
        with atedm.pruned(pipe, methods[begin // every % len(methods)]):
            for number in range(begin, min(begin + every, count)):
                draw(number, SIZES[number % len(SIZES)])
        done = min(begin + every, count)
        gc.collect()
        memory[done], seconds[done] = held(), (time.perf_counter() - start) / (done - begin)
        start = time.perf_counter()
        if tell is not None:
            tell(done, memory[done])
    with atedm.pruned(pipe, methods[0]):
        last = draw(0, SIZES[0])
    return InARow(memory, float((last - first).abs().max()), seconds)


def growth(memory: dict[int, float]) -> float:
    """MiB between the mean of the second quarter and that of the last: the first fills caches."""
    values = [*memory.values()]
    quarter = len(values) // 4
    return sum(values[-quarter:]) / quarter - sum(values[quarter : 2 * quarter]) / quarter


def plot(seen: InARow, file: Path) -> None:
    """Draw memory by number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([*seen.memory], [*seen.memory.values()], color="#2a6a8e")
    axes.set_ylim(0, 1.15 * max(seen.memory.values()))
    axes.set_xlabel("images drawn")
    axes.set_ylabel("memory of the process, MiB")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    count, picture = int(sys.argv[1]), Path(sys.argv[2])
    pipe = load_pipeline("tiny", device="cpu")
    row = in_a_row(pipe, count, 20, lambda done, mib: print(f"{done} images, {mib:.0f} MiB", flush=True))
    plot(row, picture)
    print(
        f"{count} images: memory {growth(row.memory):+.1f} MiB from the second quarter to the last, "
        f"largest {max(row.memory.values()):.0f} MiB; the last image is {row.drift:g} from the first"
    )
