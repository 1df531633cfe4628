"""Denoising-Steps-Aware Pruning (DSAP): which blocks are spared, and in which steps.

Early steps lay out the image and their attention tells important tokens from others least, so they prune less: one
attention block of every down stage and every up stage is left unpruned (supplement A.3, C.3 to C.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

#: "<down>-<up>": which attention block of each down and up stage is spared, First, Middle or Last. The paper's first.
PAIRINGS = ("F-L", "F-F", "F-M", "L-F", "L-M", "L-L")

#: When blocks are spared: see `is_prune_less`. The paper's first.
SCHEDULES = ("prune-less-early", "prune-more-early", "constant")

# Far more than the rounding of i / n, also in float32, and far less than one step.
_SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class BlockPlace:
    """Where an attention block sits in the U-Net.

    Raises:
        ValueError: If a field is out of its range.
    """

    #: Half of the U-Net.
    stage: Literal["down", "mid", "up"]
    #: Feature level, counted from 1, the finest.
    level: int
    #: Place among the attention blocks of this stage and level, counted from 0 in the order they run.
    index: int
    #: How many attention blocks this stage and level has.
    count: int
    #: How many attention layers the block has, such as 2 (A2) or 10 (A10) in SD-XL.
    layers: int
    #: Name of the module in the U-Net.
    name: str

    def __post_init__(self) -> None:
        if self.stage not in ("down", "mid", "up"):
            raise ValueError(f"stage must be 'down', 'mid' or 'up', not {self.stage!r}")
        if self.level < 1 or self.layers < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"level and layers must be at least 1 and index below count: {self}")


def prune_less_blocks(places: Iterable[BlockPlace], pairing: str = "F-L") -> frozenset[str]:
    """Names of the blocks that a prune-less step leaves unpruned (supplement A.3, C.3).

    One of every down stage and one of every up stage that has attention; never the mid stage, which is pruned always.

    Args:
        places: The attention blocks of the U-Net, in any order.
        pairing: One of `PAIRINGS`. The middle of an even number is the later of the two.

    Returns:
        A frozenset of names.

    Raises:
        ValueError: If the pairing is unknown.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {list(PAIRINGS)}, not {pairing!r}")
    down, up = pairing.split("-")
    spared = {"down": down, "up": up}

    def is_spared(place: BlockPlace) -> bool:
        index = {"F": 0, "M": place.count // 2, "L": place.count - 1}
        return place.stage in spared and place.index == index[spared[place.stage]]

    return frozenset(place.name for place in places if is_spared(place))


def is_prune_less(
    share: float, schedule: str | Callable[[float], bool] = "prune-less-early", prune_less_share: float = 0.3
) -> bool:
    """Whether a denoising step leaves the `prune_less_blocks` unpruned.

    ``"prune-less-early"`` (the paper's) says so while less than ``prune_less_share`` of the run is done: 15 of 50
    steps. ``"prune-more-early"`` is its mirror, the control of supplement C.5: the first 15 prune everywhere, and the
    blocks are spared in the last 35. ``"constant"`` never says so.

    Args:
        share: Share of the run done before this step, in [0, 1): step i of n, counted from 0, has i / n.
        schedule: One of `SCHEDULES`, or a function that is given ``share`` and says so itself.
        prune_less_share: Where the run changes over, in [0, 1]. The paper's is 15 of 50 steps.

    Returns:
        True if this is a prune-less step.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), not {share}")
    if callable(schedule):
        return bool(schedule(share))
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {list(SCHEDULES)}, not {schedule!r}")
    if not 0 <= prune_less_share <= 1:
        raise ValueError(f"prune_less_share must be in [0, 1], not {prune_less_share}")
    if schedule == "constant":
        return False
    is_early = share < prune_less_share - _SHARE_TOLERANCE
    return is_early == (schedule == "prune-less-early")


def prune_less_steps(
    steps: int, schedule: str | Callable[[float], bool] = "prune-less-early", prune_less_share: float = 0.3
) -> int:
    """How many of ``steps`` denoising steps are prune-less: 15 of 50 by default.

    Args:
        steps: Steps of the whole run, at least 1.
        schedule: As `is_prune_less`.
        prune_less_share: As `is_prune_less`.

    Returns:
        A count from 0 to ``steps``.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return sum(is_prune_less(i / steps, schedule, prune_less_share) for i in range(steps))
