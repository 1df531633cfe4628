"""What the spans of one pruned model share, and what those who look on are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atedm.hosts.runs import Caller
from atedm.method.contract import Cut, Method

PATCHING = threading.Lock()
"""Held while a model is patched, unpatched, or told of a step."""


class Observation(NamedTuple):
    """What an observer is told when tokens are dropped: see `atedm.observed`."""

    #: Name of the span in the model.
    block: str
    #: After how many layers of the span.
    layer: int
    #: Index of the denoising step.
    step: int
    #: (B, N) float32.
    importance: Tensor
    #: (B, K) int64, ascending.
    keep: Tensor
    #: (h, w) of the grid.
    size: tuple[int, int]


@dataclass
class ModelState:
    """What the spans of one pruned model share. It is set before each call of the model; a host adds what lasts."""

    method: Method
    #: Names of the pruned spans.
    spans: tuple[str, ...]
    #: Whether the step is early.
    early: bool = False
    #: Index of the denoising step. A tensor of the host, because `torch.compile` takes an int here for a constant.
    step: Tensor = field(default_factory=partial(torch.tensor, 0, device="cpu"))
    #: (early, step) in a call of `atedm.FixedPhase`; None where the timestep says both.
    fixed: tuple[bool, Tensor] | None = None
    observers: list[Callable[[Observation], None]] = field(default_factory=list)
    #: What is never dropped, (H, W) of zeros and ones over the image.
    protect: Tensor | None = None
    #: Sizes of latents, (height, width), for which that was found to leave room.
    with_room: set[tuple[int, int]] = field(default_factory=set)
    caller: Caller = field(default_factory=Caller)

    def observe(self, span: str, layer: int, cut: Cut, size: tuple[int, int]) -> None:
        """Tell whoever looks on that tokens were dropped after ``layer`` layers of a span."""
        for observer in self.observers:
            observer(Observation(span, layer, int(self.step), cut.importance, cut.keep, size))

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model, pickled or not, are not observed, as they remember nothing.
        return vars(self) | {"observers": []}


def is_attached(model: nn.Module) -> bool:
    """Whether a model is pruned."""
    return "_atedm" in vars(model)


def refuse_attached(model: nn.Module) -> None:
    """Raise a `ValueError` if a model is pruned already."""
    if is_attached(model):
        raise ValueError("this model is patched already; call atedm.remove(...) first, then apply the other method")
