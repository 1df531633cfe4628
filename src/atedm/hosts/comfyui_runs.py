"""Which step of which run a call in ComfyUI is, and what may be remembered from the call before.

ComfyUI hands each call the noise level (sigma) it is at, and an id for each condition in the batch. Conditions may come
in one batch, one after another, in any order, and in other batches from step to step. So a run remembers by span and
by condition, never by the place in a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.method.contract import Memory

#: Sigmas closer than this, relative to their size, are the same: they are rounded to float32.
_TOLERANCE = 1e-5
#: Samplers of second order evaluate a condition twice at one sigma; who does so more often mixes several images.
_MOST_TIMES = 2


@dataclass
class Turn:
    """The last evaluation of one condition."""

    sigma: float
    step: int
    #: Counts evaluations; one that does not follow the last one leaves a number out.
    number: int = 0
    #: How often this sigma was evaluated in a row.
    times: int = 1


@dataclass
class Run:
    """One run of a sampler, from the first sigma to the last."""

    #: Noise levels of the run, falling; the last is where it ends.
    sigmas: tuple[float, ...]
    #: Share of the noise schedule that is done before the first sigma and after the last: (0, 1) for a whole image, a
    #: later start for image to image.
    span: tuple[float, float] = (0.0, 1.0)
    #: Index of the step the current call belongs to.
    step: int = 0
    #: Share of the whole schedule that is done before that step, in [0, 1].
    share: float = 0.0
    #: Ids of the conditions in the current batch, in order.
    conditions: tuple[Hashable, ...] = ()
    turns: dict[Hashable, Turn] = field(default_factory=dict)
    #: By span and condition: number of the evaluation, and what was stored in it.
    stored: dict[tuple[str, Hashable], tuple[int, Tensor]] = field(default_factory=dict)
    #: Whether one condition was evaluated for several images in turns, so that nothing may be remembered.
    is_ambiguous: bool = False
    #: What was said in the log, so that it is said once a run.
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, sigmas: Tensor, model_sampling: Any = None) -> Run:
        """Describe a run over ``sigmas`` (steps + 1,); ``model_sampling`` is ComfyUI's, and tells where it starts."""
        levels = tuple(float(sigma) for sigma in sigmas)
        if model_sampling is None or not levels:
            return cls(levels)
        return cls(levels, (_done(model_sampling, levels[0]), _done(model_sampling, levels[-1])))

    def begin_call(self, options: Mapping[str, Any]) -> None:
        """Find out what is called now, from the options that ComfyUI hands every call.

        Args:
            options: ComfyUI's ``transformer_options``, with "sigmas", and "uuids" where it tells conditions apart.
        """
        sigma = float(torch.as_tensor(options["sigmas"]).max())
        steps = max(len(self.sigmas) - 1, 1)
        above = sum(level > sigma * (1 + _TOLERANCE) for level in self.sigmas[:-1])
        self.step = min(above, steps - 1)
        first, last = self.span
        self.share = first + (last - first) * self.step / steps
        self.conditions = tuple(options.get("uuids") or ())
        for condition in self.conditions:
            self._take_turn(condition, sigma)

    def _take_turn(self, condition: Hashable, sigma: float) -> None:
        turn = self.turns.get(condition)
        if turn is None:
            self.turns[condition] = Turn(sigma, self.step)
            return
        again = abs(sigma - turn.sigma) <= _TOLERANCE * turn.sigma
        turn.times = turn.times + 1 if again else 1
        # No sampler comes back to the sigma it starts from.
        at_start = bool(self.sigmas) and sigma >= self.sigmas[0] * (1 - _TOLERANCE)
        self.is_ambiguous |= turn.times > (1 if at_start else _MOST_TIMES)
        follows = (again or sigma < turn.sigma) and self.step <= turn.step + 1
        turn.number += 1 if follows else 2
        turn.sigma, turn.step = sigma, self.step

    def memory(self, span: str) -> Memory:
        """Return what the conditions of this batch stored in the evaluation before, one after another."""
        if self.is_ambiguous or not self.conditions:
            return Memory()
        parts = []
        for condition in self.conditions:
            number, part = self.stored.get((span, condition), (-1, None))
            if part is None or number != self.turns[condition].number - 1:
                return Memory()
            parts.append(part)
        if any(part.shape != parts[0].shape for part in parts):
            return Memory()
        return Memory(last=torch.cat(parts))

    def remember(self, span: str, memory: Memory) -> None:
        """Keep what a method stored, a tensor with the batch first, for each condition by itself."""
        if self.is_ambiguous or not memory.is_new or not isinstance(memory.last, Tensor):
            return
        if self.conditions and len(memory.last) % len(self.conditions) == 0:
            for condition, part in zip(self.conditions, memory.last.chunk(len(self.conditions)), strict=True):
                self.stored[span, condition] = (self.turns[condition].number, part)

    def clear(self) -> None:
        """Let go of all tensors."""
        self.stored.clear()
        self.turns.clear()


def _done(model_sampling: Any, sigma: float) -> float:
    """Share of the noise schedule that is done at ``sigma``: 0 where all is noise, 1 where none is."""
    if sigma <= 0:
        return 1.0
    most = torch.as_tensor(model_sampling.sigma_max, dtype=torch.float32).reshape(1)
    left = float(model_sampling.timestep(most.new_tensor([sigma]))) / float(model_sampling.timestep(most))
    return min(max(1 - left, 0.0), 1.0) if left == left else 0.0  # not a number where the schedule has no timesteps
