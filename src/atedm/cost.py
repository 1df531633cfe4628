"""Arithmetic of attention blocks, in multiply-accumulates (MACs), dense and pruned.

Exact formula per image and layer, for N tokens of C channels and T words of width D: the linear projections cost
18 N C² + 2 T D C, self-attention 2 N² C, cross-attention 2 N T C; the projections into and out of a block 2 N C².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atedm.config import PruningConfig
from atedm.pruning import keep_count
from atedm.schedule import BlockPlace, prune_less_blocks, prune_less_steps


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one attention block."""

    place: BlockPlace
    #: N.
    tokens: int
    #: C.
    channels: int
    #: T.
    words: int
    #: D.
    word_width: int


def block_macs(shape: BlockShape, config: PruningConfig | None = None) -> int:
    """MACs of one attention block for one image; dense without a ``config``, overheads of pruning left out."""
    n, c, t, d = shape.tokens, shape.channels, shape.words, shape.word_width
    rates = dict(config.rates_in(shape.place.layers)) if config is not None else {}
    place = config.place if config is not None else ""
    total = 2 * n * c * c
    for layer in range(shape.place.layers):
        left = keep_count(n, rates[layer]) if layer in rates else n
        in_cross = left if place == "after-self-attention" else n
        in_ff = left if place in ("after-self-attention", "before-feed-forward") else n
        total += 4 * n * c * c + 2 * n * n * c  # self-attention
        total += 2 * in_cross * c * c + 2 * t * d * c + 2 * in_cross * t * c  # cross-attention
        total += 12 * in_ff * c * c  # gated feed-forward
        n = left
    return total


def step_macs(shapes: Sequence[BlockShape], config: PruningConfig, pruned: frozenset[str], prune_less: bool) -> int:
    """MACs of all attention blocks in one step for one image: a normal one, or a prune-less one."""
    spared = prune_less_blocks((s.place for s in shapes), config.unpruned_blocks) if prune_less else frozenset()
    return sum(block_macs(s, config if s.place.name in pruned - spared else None) for s in shapes)


def mean_macs(shapes: Sequence[BlockShape], config: PruningConfig, pruned: frozenset[str], steps: int = 50) -> float:
    """Mean over a run of ``steps`` steps of `step_macs`."""
    early = prune_less_steps(steps, config.schedule, config.prune_less_share) / steps
    normal, less = (step_macs(shapes, config, pruned, kind) for kind in (False, True))
    return early * less + (1 - early) * normal


def solve_pruning_rate(
    shapes: Sequence[BlockShape], config: PruningConfig, pruned: frozenset[str], target: float, steps: int = 50
) -> PruningConfig:
    """Return ``config`` with the pruning rate at which a run costs ``target`` MACs a step on the mean.

    Raises:
        ValueError: If no rate gives that cost; the message names the range that can be had.
    """
    if config.gradual:
        raise ValueError("a rate can be solved for one pruning layer a block only, not for gradual pruning")

    def cost(rate: float) -> float:
        return mean_macs(shapes, config.replace(pruning_rate=rate), pruned, steps)

    low, high = 0.0, 1 - 1e-9
    dense, floor = cost(low), cost(high)
    if not floor <= target <= dense:
        raise ValueError(f"a mean cost of {target:.4g} MACs cannot be had; pruning reaches {floor:.4g} to {dense:.4g}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > target else (low, middle)
    return config.replace(pruning_rate=high)
