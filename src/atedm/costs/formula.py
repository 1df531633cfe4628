"""Arithmetic of attention blocks, in multiply-accumulates (MACs), dense and pruned.

For one image and one layer, N tokens of C channels and T words of width D: the linear projections cost
18 N C^2 + 2 T D C, self-attention 2 N^2 C (the supplement's Eq. 1 with a batch of one and no guidance), cross-attention
2 N T C; the projections into and out of a block 2 N C^2. Pruning adds the attention map, its ranking, and the matching.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atedm.choices import Own
from atedm.config import PruningConfig
from atedm.flash_maps import COLUMNS
from atedm.schedule import BlockPlace, is_prune_less

#: How MACs are counted: see `Macs`.
CONVENTIONS = ("exact", "paper")


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one attention block."""

    place: BlockPlace
    #: (h, w) of the token grid.
    size: tuple[int, int]
    #: C.
    channels: int
    #: T.
    words: int
    #: D.
    word_width: int
    #: H.
    heads: int = 1

    @property
    def tokens(self) -> int:
        """N."""
        return self.size[0] * self.size[1]


class Macs(NamedTuple):
    """MACs by what they are spent on, for one image.

    Two conventions sum them up. ``exact`` is what `torch.utils.flop_counter` counts (half of its FLOPs): everything.
    ``paper`` is what the paper counts: Linear and convolution, as THOP does, plus self-attention by the supplement's
    Eq. 1; the products of cross-attention and all overheads are left out.
    """

    #: Linear layers.
    linear: int = 0
    #: Both products of self-attention.
    self_attention: int = 0
    #: Both products of cross-attention.
    cross_attention: int = 0
    #: Overhead: queries, keys and their product once more, because fused attention does not yield the map.
    map: int = 0
    #: Overhead: the iterations of G-WPR.
    ranking: int = 0
    #: Overhead: the product that finds what is alike, in copy by cosine and in ToMe.
    matching: int = 0

    @property
    def overhead(self) -> int:
        """What the dense model does not do."""
        return self.map + self.ranking + self.matching

    @property
    def exact(self) -> int:
        """All of it."""
        return sum(self)

    @property
    def paper(self) -> int:
        """Linear and self-attention."""
        return self.linear + self.self_attention

    def by(self, convention: str) -> int:
        """Sum up by one of `CONVENTIONS`."""
        return self.paper if convention == "paper" else self.exact

    def plus(self, *others: Macs) -> Macs:
        """Add up, part by part."""
        return Macs(*map(sum, zip(self, *others, strict=True)))

    def times(self, factor: int) -> Macs:
        """Multiply every part."""
        return Macs(*(factor * part for part in self))


def layer_macs(shape: BlockShape, in_self: int, in_cross: int, in_ff: int) -> Macs:
    """MACs of one layer whose parts run on so many tokens."""
    c, t, d = shape.channels, shape.words, shape.word_width
    return Macs(
        linear=4 * in_self * c * c + 2 * in_cross * c * c + 2 * t * d * c + 12 * in_ff * c * c,
        self_attention=2 * in_self * in_self * c,
        cross_attention=2 * in_cross * t * c,
    )


def block_macs(
    shape: BlockShape, config: PruningConfig | None = None, *, prune_less: bool = False, reuses: bool = False
) -> Macs:
    """MACs of one attention block for one image; dense without a ``config``.

    Args:
        shape: The block.
        config: How it is pruned.
        prune_less: Whether the step is a prune-less one that does not spare this block.
        reuses: Whether the step goes by a choice of tokens made before.
    """
    n, c = shape.tokens, shape.channels
    total = Macs(linear=2 * n * c * c)
    if config is None:
        return total.plus(layer_macs(shape, n, n, n).times(shape.place.layers))
    counts = config.tokens_left(shape.place, n, prune_less=prune_less)
    place = config.place_of_reuse if reuses else config.place
    if config.needs_first_map and not reuses and counts:
        total = total.plus(Macs(map=map_macs(shape, n)))
    for layer in range(shape.place.layers):
        left = counts.get(layer, n)
        if left == n:
            total = total.plus(layer_macs(shape, n, n, n))
            continue
        in_self = left if place == "before-self-attention" else n
        in_cross = left if place in ("after-self-attention", "before-self-attention") else n
        in_ff = n if place == "after-feed-forward" else left
        total = total.plus(layer_macs(shape, in_self, in_cross, in_ff))
        total = total.plus(refill_macs(shape, config, n, left))
        if not reuses:
            total = total.plus(overhead_macs(shape, config, n, left))
        if config.matches_by_features and (config.rematch or not reuses):
            total = total.plus(Macs(matching=left * (n - left) * c))
        n = left
    return total


def at_most(config: PruningConfig) -> PruningConfig:
    """Return ``config`` as it costs most: a tolerance is never met, and has nothing to compare on the meta device."""
    return config if config.tolerance is None else config.replace(tolerance=None, map_mode="full")


def map_macs(shape: BlockShape, tokens: int) -> int:
    """MACs of queries, keys and the self-attention map of so many tokens."""
    return 2 * tokens * shape.channels * shape.channels + tokens * tokens * shape.channels


def refill_macs(shape: BlockShape, config: PruningConfig, tokens: int, kept: int) -> Macs:
    """MACs of refilling N = ``tokens`` from K = ``kept``, which is but a copy in most recoveries."""
    return Macs(matching=kept * tokens * shape.channels if config.recovery == "weighted-update" else 0)


def overhead_macs(shape: BlockShape, config: PruningConfig, tokens: int, kept: int) -> Macs:
    """MACs that choosing in one pruning layer adds: N = ``tokens`` reach it, K = ``kept`` go on."""
    c, t, d = shape.channels, shape.words, shape.word_width
    ranked = shape.heads * config.iterations if config.head_fusion == "rms" else config.iterations
    of_map, of_ranking, of_matching = 0, 0, 0
    mode = config.map_mode_for(tokens)
    if config.needs_attention_map:
        of_map += 2 * tokens * c * c + _map_products(shape, config, mode, tokens, kept)
    if config.ranks_by_self_attention or (config.ranking == "attention-received" and mode != "full"):
        rows = min(config.sampled_rows, tokens) if mode == "sampled" else tokens
        passes = ranked if config.ranks_by_self_attention else 1
        if mode == "triton":  # it sums every head's map, whether they rank apart or not
            passes = shape.heads * _iterations(config)
        of_ranking = 0 if mode == "flash" else passes * rows * tokens  # which is part of its products
    if config.ranks_by_words:
        of_map += tokens * c * c + t * d * c + tokens * t * c
        of_ranking += ranked * tokens * t * _PRODUCTS[str(config.ranking)]
    if config.ranking == "representative":
        cover = max(1, round(config.cover_share * kept))
        of_matching += cover * (tokens - cover) * c
    if config.ranking == "facility-location":
        of_matching += tokens * tokens * c
    return Macs(map=of_map, ranking=of_ranking, matching=of_matching)


def _map_products(shape: BlockShape, config: PruningConfig, mode: str | Own, tokens: int, kept: int) -> int:
    """MACs of queries times keys, for those rows of the self-attention map that are made, some more than once."""
    c = shape.channels
    if callable(mode):
        return 0  # nobody knows
    if mode == "full":
        return tokens * tokens * c
    if mode == "sampled":
        return min(config.sampled_rows, tokens) * tokens * c
    passes = _iterations(config)
    copied = kept * tokens * c if config.copies_by_attention and config.copy_map == "own" else 0
    if mode == "blocked":
        return passes * tokens * tokens * c + copied
    if mode == "triton":
        return (1 + passes) * tokens * tokens * c + copied
    # Stock flash attention multiplies by values too, and carries a bias in further columns.
    biased = c + shape.heads * COLUMNS
    return (2 * c + passes * 2 * biased) * tokens * tokens * (passes > 0) + copied


def _iterations(config: PruningConfig) -> int:
    """Passes of importance along self-attention."""
    return config.iterations if config.ranks_by_self_attention else int(config.ranking == "attention-received")


_PRODUCTS = {
    "cross-attention-entropy": 3,
    "cross-attention-hard-clip": 2,
    "cross-attention-soft-clip": 2,
    "cross-attention-power": 1,
}
"""Products of the map and a vector, or of its rows, in one iteration of G-WPR with each mapping f."""


def step_macs(shapes: Sequence[BlockShape], config: PruningConfig, pruned: frozenset[str], prune_less: bool) -> Macs:
    """MACs of all attention blocks in one step for one image, all chosen anew: a normal step, or a prune-less one."""
    spared = config.spared(s.place for s in shapes) if prune_less else frozenset()
    return Macs().plus(
        *(block_macs(s, config if s.place.name in pruned - spared else None, prune_less=prune_less) for s in shapes)
    )


class BlockStep(NamedTuple):
    """What a pruned block does in a step."""

    prune_less: bool
    #: Nothing is dropped.
    dense: bool
    #: It goes by a choice of tokens made before.
    reuses: bool


def block_steps(shape: BlockShape, config: PruningConfig, is_spared: bool, steps: int) -> Counter[BlockStep]:
    """Count what a pruned block does in the ``steps`` steps of a run.

    A choice lasts ``config.refresh_every`` steps, unless the number of tokens to choose changes in between.
    """
    counts: Counter[BlockStep] = Counter()
    made = -config.refresh_every
    made_for: dict[int, int] = {}
    for step in range(steps):
        less = is_prune_less(step / steps, config.schedule, config.prune_less_share)
        left = config.tokens_left(shape.place, shape.tokens, prune_less=less)
        dense = not left or (less and is_spared)
        reuses = not dense and step - made < config.refresh_every and made_for == left
        if not dense and not reuses:
            made, made_for = step, left
        counts[BlockStep(less, dense, reuses)] += 1
    return counts


def block_run_macs(shape: BlockShape, config: PruningConfig, is_spared: bool, steps: int) -> Macs:
    """Sum of `block_macs` of one pruned block over a run of ``steps`` steps, for one image."""
    return Macs().plus(
        *(
            block_macs(shape, None if kind.dense else config, prune_less=kind.prune_less, reuses=kind.reuses).times(n)
            for kind, n in block_steps(shape, config, is_spared, steps).items()
        )
    )


def mean_macs(
    shapes: Sequence[BlockShape],
    config: PruningConfig,
    pruned: frozenset[str],
    steps: int = 50,
    convention: str = "exact",
) -> float:
    """Mean MACs of all attention blocks over a run of ``steps`` steps for one image, by one of `CONVENTIONS`."""
    spared = config.spared(s.place for s in shapes)
    total = 0
    for s in shapes:
        name = s.place.name
        run = block_run_macs(s, config, name in spared, steps) if name in pruned else block_macs(s).times(steps)
        total += run.by(convention)
    return total / steps
