"""What the refill of matched pruning gets wrong in one step, as equations to solve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.method.correction import Corrector, Refill
from atedm.method.keep import gather_tokens
from atedm.method.recovery import update_of_match

_RIDGE = 1e-3
"""What is added to the diagonal of the normal equations, as a share of its mean."""


class Enough(Exception):
    """The step that is fitted is over; the rest of the run is not needed."""


@dataclass
class Equations:
    """Normal equations of one span."""

    square: Tensor | float = 0.0
    product: Tensor | float = 0.0

    def learn(self, refill: Refill, dense: Tensor) -> None:
        """Take in a refill, and what the dense span added to its tokens in its place, (B, N, C)."""
        source = refill.source
        own, groups = refill.known()
        known = torch.cat([own, gather_tokens(groups, source)], -1).flatten(0, 1).float()
        wrong = dense - update_of_match(refill.kept, refill.start, source)
        error = wrong.flatten(0, 1).float()
        self.square = self.square + (known.T @ known).cpu().double()
        self.product = self.product + (known.T @ error).cpu().double()

    def solve(self, *, groups: bool) -> Tensor:
        """Return the matrix, (4C, C) float32: 2C rows for a token's own, then 2C for its group, zeros if left out."""
        assert isinstance(self.square, Tensor)
        assert isinstance(self.product, Tensor)
        used = len(self.square) if groups else len(self.square) // 2
        square, product = self.square[:used, :used], self.product[:used]
        ridge = _RIDGE * square.diagonal().mean().clamp(min=1e-12)
        matrix = torch.zeros_like(self.product)
        matrix[:used] = torch.linalg.solve(square + ridge * torch.eye(used, dtype=square.dtype), product)
        return matrix.float()


@dataclass
class Watch:
    """Corrects as before, and notes the refills of one step by the call that they are of."""

    step: int
    correction: Corrector
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    #: The latest step that dropped tokens.
    latest: int = -1
    seen: list[tuple[tuple[tuple[Any, ...], dict[str, Any]], Refill]] = field(default_factory=list)

    def __call__(self, refill: Refill) -> Any:
        """Correct one refill; raise `Enough` when the step is over."""
        self.latest = max(self.latest, int(refill.step))
        if self.latest > self.step:
            raise Enough
        if int(refill.step) == self.step:
            assert self.call is not None
            self.seen.append((self.call, refill))
        return self.correction(refill)

    def note(self, _: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Hold what the model is called with. A forward pre-hook."""
        self.call = arguments, options
