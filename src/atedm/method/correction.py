"""A fitted refill: what the refill of matched pruning gets wrong, predicted from what it knows.

Where a token is refilled, four vectors are known: what sets the token apart from the mean of its group, what set its
last update apart, the update of its group, and the mean of the group's last updates. The first says what the mean
hides, the others where the updates are heading. The error of the refill is nearly linear in them, so one matrix a span
and step predicts much of it. `atedm.tuning.fit` finds the matrices by least squares on runs of the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    def known(self) -> tuple[Tensor, Tensor]:
        """Return what is known of tokens and of groups.

        Returns:
            (B, N, 2C): of each token its value and its last update, less the means of its group. (B, K, 2C): of each
            group its update and the mean of the last updates. Zeros for last updates where there are none.
        """
        own, update = self.before - gather_tokens(self.start, self.source), self.kept - self.start
        if self.last is None:
            return torch.cat([own, torch.zeros_like(own)], -1), torch.cat([update, torch.zeros_like(update)], -1)
        last = self.last.to(own.dtype)
        mean = mean_by_source(last, self.source, group_sizes(self.source, self.start.shape[1]))
        return torch.cat([own, last - gather_tokens(mean, self.source)], -1), torch.cat([update, mean], -1)


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
    #: Span and step of every matrix, so that no device is waited for in a run.
    fitted: frozenset[tuple[str, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the shapes, and see where there are matrices."""
        for span, one in self.maps.items():
            shape = tuple(one.shape) if isinstance(one, Tensor) and one.is_floating_point() else ()
            if len(shape) != 3 or shape[1] != 4 * shape[2]:
                raise ValueError(f"the correction of {span} must be (S, 4C, C) numbers, not {shape or one!r}")
        fitted = {(span, step) for span, one in self.maps.items() for step in range(len(one)) if one[step].any()}
        object.__setattr__(self, "fitted", frozenset(fitted))

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
            if (refill.span, step) not in self.fitted or (refill.last is None and step > 0):
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
        own, groups = refill.known()
        of_groups = groups @ chosen[2 * channels :]
        return own @ chosen[: 2 * channels] + gather_tokens(of_groups, refill.source), holds
