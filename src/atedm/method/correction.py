"""A fitted refill: what the refill of matched pruning gets wrong, predicted from what it knows.

Where a token is refilled, four vectors are known: what sets the token apart from the mean of its group, what set its
last update apart, the update of its group, and the mean of the group's last updates. The first says what the mean
hides, the others where the updates are heading. The error of the refill is nearly linear in them, so one matrix a span
and step predicts much of it. `atedm.tuning.fit` finds the matrices by least squares on runs of the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from atedm.method.keep import gather_tokens
from atedm.method.recovery import group_sizes, mean_by_source


class Refill(NamedTuple):
    """What is known of a span when it is refilled."""

    #: Name of the span.
    span: str
    #: Index of the denoising step, from 0; a tensor without dimensions where the model may be compiled.
    step: int | Tensor
    #: (B, N, C): the tokens before the span.
    before: Tensor
    #: (B, K, C): the means of the groups that the span ran on.
    start: Tensor
    #: (B, K, C): what became of them.
    kept: Tensor
    #: (B, N) int64 positions within K: the group of each token.
    source: Tensor
    #: (B, N, C): the updates of the step before; None if there was none.
    last: Tensor | None

    def of_tokens(self) -> Tensor:
        """Return what is each token's own, (B, N, 2C): its value and its last update, less the means of its group."""
        own = self.before - gather_tokens(self.start, self.source)
        last = torch.zeros_like(own) if self.last is None else self.last - gather_tokens(self._last_mean, self.source)
        return torch.cat([own, last.to(own.dtype)], dim=-1)

    def of_groups(self) -> Tensor:
        """Return what is its group's, (B, K, 2C): the update, and the mean of the last updates."""
        last = torch.zeros_like(self.start) if self.last is None else self._last_mean
        return torch.cat([self.kept - self.start, last.to(self.kept.dtype)], dim=-1)

    @property
    def _last_mean(self) -> Tensor:
        assert self.last is not None
        kept = self.start.shape[1]
        return mean_by_source(self.last, self.source, group_sizes(self.source, kept)).to(self.start.dtype)


class Corrector(Protocol):
    """What adds to a refill: a `Correction`, or what watches refills to find one."""

    def __call__(self, refill: Refill) -> tuple[Tensor, bool | Tensor] | None:
        """Return what to add to the update of the match, (B, N, C), and whether it holds; None adds nothing."""
        ...


@dataclass(frozen=True, eq=False)
class Correction:
    """One matrix a span and step, found by `atedm.fit`.

    Raises:
        ValueError: If the matrices are not (S, 4C, C).
    """

    #: By the name of the span, (S, 4C, C) floating: the matrices of the first S steps, zeros where there is none.
    maps: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Check the shapes."""
        for span, one in self.maps.items():
            if (
                not isinstance(one, Tensor)
                or one.ndim != 3
                or one.shape[1] != 4 * one.shape[2]
                or not one.is_floating_point()
            ):
                raise ValueError(
                    f"the correction of {span} must be (S, 4C, C) numbers, not {tuple(getattr(one, 'shape', ()))}"
                )

    def to(self, device: torch.device, dtype: torch.dtype) -> Correction:
        """Return it where a model is, so that it need not be moved in every step."""
        return Correction({span: one.to(device, dtype) for span, one in self.maps.items()})

    def __call__(self, refill: Refill) -> tuple[Tensor, bool | Tensor] | None:
        """Return what to add, and whether it holds. Steps after the first must have something to remember."""
        maps = self.maps.get(refill.span)
        if maps is None or maps.shape[-1] != refill.before.shape[-1]:
            return None
        step, steps = refill.step, len(maps)
        if not torch.compiler.is_compiling():
            step = int(step)
            if step >= steps or not maps[step].any() or (refill.last is None and step > 0):
                return None
        maps = maps.to(refill.before.device, refill.before.dtype)
        holds: bool | Tensor = True
        if isinstance(step, int):
            chosen = maps[step]
        else:
            row = step.clamp(max=steps - 1).to(maps.device).reshape(1)
            chosen = maps.index_select(0, row).squeeze(0)
            holds = (step == 0).to(chosen.device)
            if refill.last is not None:  # zeros where a graph was given no memory
                holds = holds | refill.last.any()
            holds = holds & (step < steps).to(chosen.device) & chosen.any()
        channels = chosen.shape[-1]
        of_groups = refill.of_groups() @ chosen[2 * channels :]
        return refill.of_tokens() @ chosen[: 2 * channels] + gather_tokens(of_groups, refill.source), holds
