"""Which tokens a run in ComfyUI kept: a record of the last run, for the node that shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from atedm.method.contract import Place


@dataclass
class KeptInSpan:
    """What one span kept of the images, the condition that is asked for, not the negative one."""

    place: Place
    #: (h, w) of the grid.
    size: tuple[int, int]
    #: By index of the step: (images, h w) bool.
    steps: dict[int, Tensor] = field(default_factory=dict)

    def share(self, step: int | None = None) -> Tensor:
        """Share of the steps that kept each token, or of one step: (images, h, w) float32 in [0, 1], on the CPU.

        Raises:
            ValueError: If the span was not pruned in that step.
        """
        if step is not None and step not in self.steps:
            pruned = ", ".join(map(str, sorted(self.steps)))
            raise ValueError(f"{self.place.name} was not pruned in step {step}; it was in {pruned}")
        masks = list(self.steps.values()) if step is None else [self.steps[step]]
        return torch.unflatten(torch.stack(masks).float().mean(0), 1, self.size).cpu()


@dataclass
class Record:
    """What each span kept in the last run."""

    spans: dict[str, KeptInSpan] = field(default_factory=dict)

    def add(self, place: Place, size: tuple[int, int], step: int, keep: Tensor) -> None:
        """Note what was kept: ``keep`` (images, K) int64."""
        span = self.spans.get(place.name)
        if span is None or span.size != size or any(len(mask) != len(keep) for mask in span.steps.values()):
            span = self.spans[place.name] = KeptInSpan(place, size)
        mask = torch.zeros(len(keep), size[0] * size[1], dtype=torch.bool, device=keep.device)
        span.steps[step] = mask.scatter_(1, keep, True)

    def clear(self) -> None:
        """Forget the last run."""
        self.spans.clear()
