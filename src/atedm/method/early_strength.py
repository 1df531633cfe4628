"""Any method, gentler in early steps: these lay out the image, and what goes wrong in them stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from atedm.method.contract import Cut, Memory, Method, Place, View
from atedm.method.schedule import Early
from atedm.words import check_share


@dataclass(frozen=True)
class EarlyStrength:
    """A method whose rate is multiplied by ``strength`` in the first ``share`` of the steps.

    What the method itself does in early steps, such as sparing some spans, it goes on doing.

        >>> from atedm.method.matched import Matched
        >>> EarlyStrength(Matched(rate=0.5), strength=0.5).count(Place("mid", 1, 0, 1, 2, ""), 100, early=True)
        75

    Raises:
        ValueError: If ``strength`` or ``share`` is not in [0, 1].
    """

    method: Method
    #: What the rate is multiplied by in early steps: 0 leaves them dense, 1 prunes them as all others.
    strength: float
    #: Share of the run that is early.
    share: float = 0.3
    #: Share of the tokens dropped in steps that are not early; not a number takes the method's.
    rate: float = math.nan

    def __post_init__(self) -> None:
        """Check the numbers, and let the method have the rate."""
        check_share("strength", self.strength)
        check_share("share", self.share)
        if math.isnan(self.rate):
            object.__setattr__(self, "rate", self.method.rate)
        else:
            object.__setattr__(self, "method", replace(self.method, rate=self.rate))  # type: ignore[type-var]

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def dense_layers(self) -> int:
        """As the method."""
        return self.method.dense_layers

    @property
    def remembers(self) -> bool:
        """As the method."""
        return self.method.remembers

    def is_early(self, share: float) -> bool:
        """Whether a step counts as early, here or for the method."""
        return Early(self.share).is_early(share) or self.method.is_early(share)

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        """Tokens of a span that go on."""
        if not early:
            return self.method.count(place, tokens)
        gentle: Method = replace(self.method, rate=self.strength * self.rate)  # type: ignore[type-var]
        return gentle.count(place, tokens, early=True)

    def drop(self, view: View) -> Cut:
        """As the method: how many stay is in the view."""
        return self.method.drop(view)

    def remember_dense(self, before: Tensor, after: Tensor, memory: Memory) -> None:
        """As the method, if it remembers steps that drop nothing; (B, N, C) before and after."""
        if remember := getattr(self.method, "remember_dense", None):
            remember(before, after, memory)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings of the method, with those of the early steps."""
        return self.method.as_dict() | {"early_strength": self.strength, "early_share": self.share}
