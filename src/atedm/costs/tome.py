"""Arithmetic of ToMe, the peer of the paper, as the ``tomesd`` package does it.

Every layer matches its tokens anew: one of each 2 x 2 cell is a destination, the others are sources, and the share of
sources most alike to a destination is merged into it; results are copied back after each part of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atedm.costs.spans import Macs, SpanShape, layer_macs, span_macs
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

    def merged(self, shape: SpanShape) -> int:
        """Tokens of a block that are merged away."""
        if self.levels == "highest" and shape.place.level > 1:
            return 0
        return min(int(shape.tokens * self.ratio), shape.tokens - _destinations(shape))


def tome_macs(shape: SpanShape, tome: ToMe) -> Macs:
    """MACs of one attention block for one image with ToMe in each of its layers."""
    n, c = shape.tokens, shape.channels
    merged = tome.merged(shape)
    left = n - merged
    elsewhere = left if tome.merge == "everything" else n
    layer = layer_macs(shape, left, elsewhere, elsewhere)
    if merged:
        destinations = _destinations(shape)
        layer = layer.plus(Macs(overhead=(n - destinations) * destinations * c))
    return Macs(linear=2 * n * c * c).plus(layer.times(shape.place.layers))


def tome_step_macs(shapes: Sequence[SpanShape], tome: ToMe, early: bool = False) -> Macs:
    """MACs of all attention blocks in one step for one image: a normal one, or one that spares some blocks."""
    spare = tome.spare
    return Macs().plus(*(span_macs(s) if early and spare.spares(s.place) else tome_macs(s, tome) for s in shapes))


def tome_mean_macs(shapes: Sequence[SpanShape], tome: ToMe, steps: int = 50, convention: str = "exact") -> float:
    """Mean of `tome_step_macs` over a run of ``steps`` steps, summed up by one of the conventions."""
    early = sum(tome.spare.is_early(step / steps) for step in range(steps)) / steps
    normal, less = (tome_step_macs(shapes, tome, kind).by(convention) for kind in (False, True))
    return early * less + (1 - early) * normal


def _destinations(shape: SpanShape) -> int:
    height, width = shape.size
    return (height // 2) * (width // 2)


def refuse_tome(shapes: Sequence[SpanShape], method: object) -> None:
    """Raise a `ValueError` if ToMe is asked for in a transformer, where tomesd does nothing."""
    if isinstance(method, ToMe) and any(shape.place.is_stretch for shape in shapes):
        raise ValueError("tomesd merges tokens in U-Nets only; its cost in a transformer is not counted")
