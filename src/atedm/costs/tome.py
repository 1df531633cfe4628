"""Arithmetic of ToMe, the peer of the paper, as the ``tomesd`` package does it.

Every layer matches its tokens anew: one of each 2 x 2 cell is a destination, the others are sources, and the share of
sources most alike to a destination is merged into it; results are copied back after each part of the layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from atedm.costs.macs import Macs, SpanShape, layer_macs
from atedm.method.schedule import Early
from atedm.words import check_name, is_number

#: What runs on merged tokens: self-attention alone, as by default, or with cross-attention and feed-forward, as the
#: paper widens it for SD-XL (supplement B.1).
MERGES = ("everything", "self-attention")
#: Where: at all feature levels, as the paper widens it, or at the highest alone, as by default.
LEVELS = ("all", "highest")


@dataclass(frozen=True)
class ToMe:
    """One setting of ToMe.

    Raises:
        ValueError: If a value is out of its range or a name unknown.
    """

    #: Share of the tokens merged away, from 0 to the 0.75 that ToMe can do.
    ratio: float = 0.5
    #: One of `MERGES`.
    merge: str = "everything"
    #: One of `LEVELS`.
    levels: str = "all"
    #: Share of the run in which one block of each down and up stage is spared, as the paper does to compare; 0 is ToMe
    #: as it comes, 0.3 the paper's 15 of 50 steps.
    early_share: float = 0.0
    #: Which blocks those are, see `atedm.method.schedule.PAIRINGS`.
    pairing: str = "F-L"

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.ratio) or not 0 <= self.ratio <= 0.75:
            raise ValueError(f"ratio must be from 0 to 0.75, the most that ToMe can merge, not {self.ratio!r}")
        check_name("merge", self.merge, MERGES)
        check_name("levels", self.levels, LEVELS)
        Early(self.early_share, self.pairing)

    @property
    def spare(self) -> Early:
        """Which steps are early, and which blocks they leave alone."""
        return Early(self.early_share, self.pairing)

    def is_early(self, share: float) -> bool:
        """Whether a step spares some blocks, given the share of the run before it."""
        return self.spare.is_early(share)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"method": "tome", **asdict(self)}

    def kept(self, shape: SpanShape, *, early: bool = False) -> int:
        """Tokens of a span that are left in each of its layers."""
        is_spared = early and self.early_share > 0 and self.spare.spares(shape.place)
        if is_spared or (self.levels == "highest" and shape.place.level > 1):
            return shape.tokens
        return max(shape.tokens - int(shape.tokens * self.ratio), _destinations(shape))

    def span_macs(self, shape: SpanShape, *, early: bool = False) -> Macs:
        """MACs of one span in one step for one image."""
        n, c, left = shape.tokens, shape.channels, self.kept(shape, early=early)
        layers, matching = shape.place.layers, Macs()
        if left < n:
            destinations = _destinations(shape)
            matching = Macs(overhead=(n - destinations) * destinations * c).times(layers)
        if shape.place.is_stretch:
            return shape.layers_macs(0, layers, left).plus(matching)
        elsewhere = left if self.merge == "everything" else n
        return shape.ends_macs().plus(layer_macs(shape, left, elsewhere, elsewhere).times(layers), matching)


def _destinations(shape: SpanShape) -> int:
    height, width = shape.size
    return (height // 2) * (width // 2)
