"""Lessons from the small SDXL for the small SD3: what it predicts under guidance (Meng et al., 2023).

A picture under guidance is simpler than one without, and what a teacher predicts varies less than a noisy picture's own
noise, so a small model learns from it in a fraction of the time. The student needs no guidance afterwards, as FLUX.1
does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from atedm.tiny.data import ScenePool
from atedm.tiny.denoiser import Denoiser, load_parts
from atedm.tiny.noise_paths import NoisePath, VPath
from atedm.tiny.text import build_text_encoders
from atedm.tiny.unet import build_unet

_CHUNK = 32


class Lesson(NamedTuple):
    """What a student is shown, and what it is to say."""

    #: (B, 4, h, w) float32, on the student's path.
    noisy: Tensor
    #: (B, 4, h, w) float32: the student's output where it says what the teacher says.
    target: Tensor
    #: (B,) float32, the student's.
    times: Tensor
    #: (B, TOKENS) int64.
    ids: Tensor
    #: (B, 6) int64: see `atedm.tiny.denoiser.whole_picture`.
    sizes: Tensor


class GuidedTeacher:
    """The small SDXL under guidance, asked about noisy pictures of another path."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, device: torch.device, guidance: float) -> None:
        """Open a teacher.

        Args:
            folder: Its pipeline.
            tokenizer: Of the captions.
            device: Where it runs.
            guidance: Scale.
        """
        self._model = Denoiser(build_text_encoders(tokenizer), build_unet(), compiled=False)
        load_parts(self._model, folder)
        self._model.eval().requires_grad_(False).to(device)
        self._path, self._guidance = VPath(device), guidance
        times = torch.arange(1000, device=device)
        signal, sigma = (share.flatten() for share in self._path.shares(times))
        #: Share of noise at each time of the teacher, where signal and noise sum up to 1.
        self._sigmas = sigma / (signal + sigma)

    @torch.no_grad()
    def lesson(self, picture: Tensor, ids: Tensor, sizes: Tensor, path: NoisePath) -> Lesson:
        """Noise pictures along the student's ``path``, whose signal and noise sum up to 1, and ask the teacher.

        Args:
            picture: (B, 4, h, w).
            ids: (B, TOKENS) int64.
            sizes: (B, 6).
            path: A `FlowPath`.
        """
        count = len(picture)
        drawn = path.draw_times(count, picture.device) / 1000
        at = torch.searchsorted(self._sigmas, drawn).clamp_max(999)
        times = 1000 * self._sigmas[at]  # a time that both paths have
        noise = torch.randn_like(picture)
        noisy = path.noised(picture, noise, times)
        signal, sigma = path.shares(times)
        seen = noisy / (signal.square() + sigma.square()).sqrt()  # the same picture where their squares sum up to 1
        keep = torch.cat([torch.zeros(count), torch.ones(count)]).to(picture.device)
        with torch.autocast(picture.device.type, torch.bfloat16):
            both = self._model(seen.repeat(2, 1, 1, 1), at.repeat(2), ids.repeat(2, 1), keep, sizes.repeat(2, 1))
        without, with_caption = both.float().chunk(2)
        said = without + self._guidance * (with_caption - without)
        clean, noise_said = self._path.read(seen, said, at)
        return Lesson(noisy, path.target(clean, noise_said, times), times, ids, sizes)


class LessonPool:
    """Lessons to draw batches from, a part of which is replaced at every draw: each is used several times."""

    def __init__(self, teacher: GuidedTeacher, scenes: ScenePool, path: NoisePath, *, size: int, uses: int) -> None:
        """Fill the pool.

        Args:
            teacher: Who is asked.
            scenes: What about.
            path: The student's.
            size: How many lessons it holds.
            uses: How often each is drawn, on average.
        """
        self._teacher, self._scenes, self._path, self._uses = teacher, scenes, path, uses
        filled = [self._ask() for _ in range(0, size, _CHUNK)]
        self._lessons = Lesson(*map(torch.cat, zip(*filled, strict=True)))
        self._next, self._owed = 0, 0.0

    def draw(self, batch: int) -> Lesson:
        """Draw a batch at random."""
        self._owed += batch / self._uses
        size = len(self._lessons.ids)
        while self._owed >= _CHUNK:
            rows = (self._next + torch.arange(_CHUNK)) % size
            for held, new in zip(self._lessons, self._ask(), strict=True):
                held[rows] = new
            self._next = int(rows[-1]) + 1
            self._owed -= _CHUNK
        drawn = torch.randint(size, (batch,), device=self._lessons.ids.device)
        return Lesson(*(held[drawn] for held in self._lessons))

    def _ask(self) -> Lesson:
        return self._teacher.lesson(*self._scenes.draw(_CHUNK), self._path)


def lesson_loss(model: torch.nn.Module, lesson: Lesson) -> Tensor:
    """Mean square of the distance of a student's output to the teacher's."""
    keep = torch.ones(len(lesson.ids), device=lesson.ids.device)
    with torch.autocast(lesson.noisy.device.type, torch.bfloat16):
        output = model(lesson.noisy, lesson.times, lesson.ids, keep, lesson.sizes)
    return functional.mse_loss(output.float(), lesson.target)
