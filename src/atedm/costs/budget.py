"""A budget in place of a rate: which pruning rate makes a step, or a run, cost so much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from atedm.choices import check_name
from atedm.config import PruningConfig
from atedm.costs.formula import CONVENTIONS, BlockShape, mean_macs, step_macs
from atedm.costs.tome import ToMe, tome_mean_macs

#: What a budget is for: the mean step of a run, or a normal step, which is what the paper's figures are.
BUDGETS_OF = ("mean", "normal-step")

_HIGHEST_RATE = 1 - 1e-9


class CostOutOfReach(ValueError):
    """No rate or ratio brings a method down to the cost asked for."""


def solve_pruning_rate(
    shapes: Sequence[BlockShape],
    config: PruningConfig,
    pruned: frozenset[str],
    target: float,
    steps: int = 50,
    *,
    of: str = "mean",
    convention: str = "exact",
    rest: float = 0,
    images: int = 1,
) -> PruningConfig:
    """Return ``config`` with the least pruning rate at which a step costs no more than ``target`` MACs.

    Args:
        shapes: All attention blocks.
        config: What to prune and how.
        pruned: Names of the blocks that are pruned.
        target: MACs of a step for one image.
        steps: Steps of the run.
        of: One of `BUDGETS_OF`.
        convention: One of `CONVENTIONS`.
        rest: MACs outside the attention blocks, counted in ``target``.
        images: U-Net calls an image takes, for the figures of the message.

    Raises:
        ValueError: If no rate gives that cost; the message names the range that can be had.
    """
    check_name("of", of, BUDGETS_OF)
    check_name("convention", convention, CONVENTIONS)
    if config.gradual:
        raise ValueError("a rate can be solved for one pruning layer a block only, not for gradual pruning")

    def cost(rate: float) -> float:
        at = config.replace(pruning_rate=rate)
        if of == "mean":
            return rest + mean_macs(shapes, at, pruned, steps, convention)
        return rest + step_macs(shapes, at, pruned, prune_less=False).by(convention)

    what = "a mean step" if of == "mean" else "a normal step"
    return config.replace(pruning_rate=_least(cost, target, _HIGHEST_RATE, what, images))


def solve_tome_ratio(
    shapes: Sequence[BlockShape],
    tome: ToMe,
    target: float,
    steps: int = 50,
    *,
    convention: str = "exact",
    rest: float = 0,
    images: int = 1,
) -> ToMe:
    """Return ``tome`` with the least ratio at which the mean step of a run costs no more than ``target`` MACs.

    Raises:
        ValueError: If no ratio gives that cost; the message names the range that can be had.
    """
    check_name("convention", convention, CONVENTIONS)

    def cost(ratio: float) -> float:
        return rest + tome_mean_macs(shapes, dataclasses.replace(tome, ratio=ratio), steps, convention)

    return dataclasses.replace(tome, ratio=_least(cost, target, 0.75, "a step with ToMe", images))


def _least(cost: Callable[[float], float], target: float, highest: float, what: str, images: int) -> float:
    """Return the least x in [0, highest] with ``cost(x) <= target``; above 0, cost falls with x."""
    dense, floor = cost(0.0), cost(highest)
    if not floor <= target <= dense:
        asked, most, least = (images * macs / 1e12 for macs in (target, dense, floor))
        raise CostOutOfReach(
            f"{what} cannot cost {asked:.4g} T MACs, {target / dense:.1%} of the dense {most:.4g}; "
            f"pruning reaches down to {least:.4g}, {floor / dense:.1%}"
        )
    if target == dense:
        return 0.0
    low, high = 0.0, highest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > target else (low, middle)
    return min(math.ceil(high * 1e6) / 1e6, highest)  # six digits are finer than one token of a million
