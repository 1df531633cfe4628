"""Draw images by plans and keep them: what was drawn once is not drawn again, whichever run asks for it."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from atedm.files import save_image
from atedm.hosts.models import find_model
from atedm.lab.evaluation.images import image_file
from atedm.lab.scores.pixels import distances
from atedm.lab.timing import Stopwatch
from atedm.patch import pruned
from atedm.plans.plan import Plan

Told = Callable[[], None]


@dataclass(frozen=True)
class Easel:
    """Draws the prompts of a search by any plan, each from its own noise."""

    pipe: Any
    prompts: tuple[str, ...]
    #: The dense run: a plan of the full number of steps and nothing else.
    dense: Plan
    seed: int
    #: Where the images are kept.
    folder: Path

    def folder_of(self, plan: Plan) -> Path:
        """Return the folder of a plan's images."""
        return self.folder / ("dense" if plan == self.dense else key_of(plan))

    def distances(self, plan: Plan, count: int, told: Told = lambda: None) -> list[float]:
        """Return the distances in dB of the first ``count`` images by a plan to the dense ones; draw those missing."""
        return distances(self.files(plan, count, told), self.files(self.dense, count, told))

    def files(self, plan: Plan, count: int, told: Told = lambda: None) -> list[Path]:
        """Return the first ``count`` images by a plan; draw what is missing, and tell of each image."""
        files = [image_file(self.folder_of(plan), index) for index in range(count)]
        missing = [index for index, file in enumerate(files) if not file.exists()]
        if missing:
            with self._applied(plan):
                for index in missing:
                    save_image(self._draw(plan, index), files[index])
                    told()
        return files

    def seconds(self, plans: Sequence[Plan], rounds: int, told: Told = lambda: None) -> list[list[float]]:
        """Time an image of the first prompt by each plan, in turns; return the seconds of each round by plan."""
        found: list[list[float]] = [[] for _ in plans]
        for _ in range(rounds):
            for plan, times in zip(plans, found, strict=True):
                with self._applied(plan):
                    started = time.perf_counter()
                    self._draw(plan, 0)
                    times.append(time.perf_counter() - started)
                told()
        return found

    def step_seconds(self, plan: Plan) -> tuple[list[float], float]:
        """Time an image by a plan: the seconds of each step of the model, and of all else."""
        model, calls_so_far = find_model(self.pipe), itertools.count()
        with self._applied(plan):
            watch = Stopwatch(self.pipe.device)
            hooks = [
                model.register_forward_pre_hook(lambda *_: watch.lap("else")),
                model.register_forward_hook(lambda *_: watch.lap(f"call {next(calls_so_far)}")),
            ]
            try:
                self._draw(plan, 0)
                watch.lap("else")
            finally:
                for hook in hooks:
                    hook.remove()
        seconds = {name: milliseconds / 1e3 for name, milliseconds in watch.read().items()}
        outside, calls = seconds.pop("else"), [*seconds.values()]
        each = max(1, len(calls) // plan.steps)  # a transformer may be called once with the prompt and once without
        return [sum(calls[i : i + each]) for i in range(0, len(calls), each)], outside

    def _applied(self, plan: Plan) -> AbstractContextManager[object]:
        return nullcontext() if plan == self.dense else pruned(self.pipe, plan)

    def _draw(self, plan: Plan, index: int) -> Image.Image:
        images: list[Image.Image] = self.pipe(self.prompts[index], **call_of(plan, self.seed + index)).images
        return images[0]


def call_of(plan: Plan, seed: int) -> dict[str, Any]:
    """Return what a pipeline is called with for an image by a plan, but for the prompt."""
    width, height = plan.size or (None, None)
    guidance = {} if plan.guidance is None else {"guidance_scale": plan.guidance}
    noise = torch.Generator("cpu").manual_seed(seed)
    return {"num_inference_steps": plan.steps, "width": width, "height": height, "generator": noise, **guidance}


def key_of(plan: Plan) -> str:
    """Name what a plan does, in 16 letters and digits."""
    return hashlib.sha256(json.dumps(plan.settings(), sort_keys=True).encode()).hexdigest()[:16]
