"""What the spans of a MODEL of ComfyUI share: what prunes it, and one call of it as they see it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from atedm.hosts.comfyui_kept import Record
from atedm.hosts.comfyui_runs import Run
from atedm.method.contract import Memory, Method, Place

KEY = "atedm"
"""Names what this host lays on a model."""


@dataclass
class Pruning:
    """What is laid on one model. Clones of it share it."""

    method: Method
    spans: tuple[Span, ...] = ()
    record: Record = field(default_factory=Record)


@dataclass
class Call:
    """One call of a model, as its spans see it."""

    pruning: Pruning
    run: Run
    #: Whether the step is early.
    early: bool
    #: How many conditions the batch holds, and which of them is asked for rather than turned away from.
    conditions: int = 1
    wanted: int = 0
    #: (height, width) of the latents.
    latents: tuple[int, int] = (0, 0)
    #: How many tokens the prompt has, where they run beside the image's; None until a block was handed them.
    words: int | None = None

    def count(self, place: Place, tokens: int) -> int:
        """Tokens of a span that go on in this call."""
        return self.pruning.method.count(place, tokens, early=self.early)

    def say(self, line: str) -> None:
        """Write a line to the log, once a run."""
        if line not in self.run.said:
            self.run.said.add(line)
            logging.getLogger(KEY).warning("Token pruning: %s", line)

    def memory(self, place: Place) -> Memory:
        """What the span remembers of the step before."""
        return self.run.memory(place.name)

    def finish(self, place: Place, memory: Memory, size: tuple[int, int], keep: Tensor) -> None:
        """Store what a span stored, and note which tokens (B, K) it kept."""
        self.run.remember(place.name, memory)
        self.pruning.record.add(place, size, self.run.step, keep.chunk(self.conditions)[self.wanted])


class Span(Protocol):
    """Some layers of a model that run on fewer tokens, as this host sees them."""

    @property
    def place(self) -> Place:
        """Where it sits."""
        ...

    def lay_on(self, model: Any) -> None:
        """Lay its patches on a clone."""
        ...

    def begin_call(self, call: Call, options: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
        """Look whether it can be pruned in this call."""
        ...

    def end_call(self) -> None:
        """Forget the call, also after an exception or an interrupt."""
        ...
