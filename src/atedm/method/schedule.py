"""Denoising-Steps-Aware Pruning (DSAP): early steps spare some spans.

Early steps lay out the image, and their attention tells important tokens from others least. So they prune less: one
attention block of every down stage and every up stage is left unpruned (supplement A.3, C.3 to C.5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from atedm.method.contract import Place
from atedm.words import check_name, check_share

#: "<down>-<up>": which attention block of each down and up stage is spared, First, Middle or Last. The paper's first.
PAIRINGS = ("F-L", "F-F", "F-M", "L-F", "L-M", "L-L")

# Far more than the rounding of i / n, also in float32, and far less than one step.
_SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Early:
    """Which steps are early, and which spans they spare. A class of one's own with these two methods does as well.

    >>> Early().is_early(14 / 50), Early().is_early(15 / 50)
    (True, False)

    Raises:
        ValueError: If the share is not in [0, 1] or the pairing is unknown.
    """

    #: Share of the run that is early. The paper's is 15 of 50 steps.
    share: float = 0.3
    #: One of `PAIRINGS`. The middle of an even number is the later of the two.
    pairing: str = "F-L"

    def __post_init__(self) -> None:
        """Check both."""
        check_share("share", self.share)
        check_name("pairing", self.pairing, PAIRINGS)

    def is_early(self, share: float) -> bool:
        """Whether a step is early, given the share of the run that is done before it: step i of n has i / n."""
        return share < self.share - _SHARE_TOLERANCE

    def spares(self, place: Place) -> bool:
        """Whether early steps leave a span unpruned. The middle of a U-Net is pruned always."""
        letters = dict(zip(("down", "up"), self.pairing.split("-"), strict=True))
        index = {"F": 0, "M": place.count // 2, "L": place.count - 1}
        return place.stage in letters and place.index == index[letters[place.stage]]


def spared_spans(places: Iterable[Place], spare: Early | None) -> frozenset[str]:
    """Names of the spans that early steps leave unpruned."""
    return frozenset() if spare is None else frozenset(place.name for place in places if spare.spares(place))
