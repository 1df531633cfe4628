"""AT-EDM (Wang et al., CVPR 2024): rank the tokens by attention, drop the least important, copy them back by attention.

The method in one attention block, with the sections of the paper's supplement:

1. The first layer runs on all tokens (A.2). Its self-attention map A is the graph that ranks them.
2. **Rank.** G-WPR passes importance along A until it settles (Algorithm 1, `atedm.method.gwpr`).
3. **Drop.** The most important tokens go on, 37 % of them at the paper's rate of 0.63 (A.3).
4. **Go on.** The other layers of the block run on these alone. The host does that.
5. **Copy.** Before the next convolution a dropped token takes the value of the kept token that attends to it most
   (similarity-based copy, `atedm.method.matching.attention_source`).

In the first 15 of 50 steps one block of each stage is spared (DSAP, A.3, `atedm.method.schedule`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from atedm.method.contract import Cut, Place, View, Where
from atedm.method.gwpr import ITERATIONS
from atedm.method.keep import gather_tokens, keep_count, keep_most_important
from atedm.method.map_scores import self_attention_scores
from atedm.method.places import everywhere, function_name, not_second_level, where_name
from atedm.method.protection import with_protected
from atedm.method.recovery import similarity_copy
from atedm.method.schedule import Early
from atedm.words import check_callable, check_rate, check_whole


class ToRefill(NamedTuple):
    """What a refill of one's own is given."""

    #: (B, K, C): the kept tokens after the last layer.
    kept: Tensor
    #: (B, N, C): all tokens as they were when some were dropped.
    before: Tensor
    #: (B, K) int64, ascending: which were kept.
    keep: Tensor
    #: (h, w) of the grid, N = h w.
    size: tuple[int, int]


_PAPERS_EARLY = Early()

#: A ranking of one's own: gives the importance (B, N) of ``view.tokens``.
Rank: TypeAlias = Callable[[View], Tensor]
#: A refill of one's own: gives all tokens (B, N, C).
Refill: TypeAlias = Callable[[ToRefill], Tensor]


@dataclass(frozen=True)
class AtEdm:
    """The paper's method. The defaults are its setting, so that ``rate`` is the one slider.

        >>> AtEdm().count(Place("down", 3, 0, 2, 10, "down_blocks.2.attentions.0"), 1024)
        379

    To the letter it is the paper's up to 1,024 tokens a block; above, ``sample`` takes some rows of the attention map
    for all, because fused attention makes no map and the whole of it eats a third of what pruning saves.

    Raises:
        ValueError: If a value is out of its range.
    """

    #: Share of the tokens dropped in a block, in [0, 1). The paper's 0.63 keeps 37 % (A.3).
    rate: float = 0.63
    #: Which blocks: a predicate of a `Place`. AT-EDM† is ``not_second_level``.
    where: Where = everywhere
    #: Which blocks early steps spare; None prunes alike in every step, as few-step models need.
    spare: Early | None = _PAPERS_EARLY
    #: A ranking of one's own; None is G-WPR on the self-attention map.
    rank: Rank | None = None
    #: A refill of one's own; None is similarity-based copy.
    refill: Refill | None = None
    #: How many rows of the map are made above 1,024 tokens; None always makes the whole map.
    sample: int | None = 256
    #: Iterations of G-WPR. The paper gives no number.
    iterations: int = ITERATIONS

    dense_layers = 1
    remembers = False

    def __post_init__(self) -> None:
        """Check every value."""
        check_rate("rate", self.rate)
        check_callable("where", self.where, "a predicate of a Place, such as atedm.not_second_level")
        if self.spare is not None and not (hasattr(self.spare, "is_early") and hasattr(self.spare, "spares")):
            raise ValueError(f"spare must be an Early or None, not {self.spare!r}")
        for name in ("rank", "refill"):
            if getattr(self, name) is not None:
                check_callable(name, getattr(self, name), "a function, see docs/how-to/extend.md, or None")
        if self.sample is not None:
            check_whole("sample", self.sample)
        check_whole("iterations", self.iterations)

    @property
    def name(self) -> str:
        """AT-EDM, or AT-EDM† where the second level is not pruned."""
        return "AT-EDM†" if self.where is not_second_level else "AT-EDM"

    def is_early(self, share: float) -> bool:
        """Whether a step is early: see `Early.is_early`."""
        return self.spare is not None and self.spare.is_early(share)

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        """Tokens that go on after the first layer: all of them where no layer is left to run on fewer."""
        spared = early and self.spare is not None and self.spare.spares(place)
        if spared or place.layers <= self.dense_layers or not self.where(place):
            return tokens
        return keep_count(tokens, self.rate)

    def drop(self, view: View) -> Cut:
        """Rank, choose, and prepare the copy. See the head of this file.

        Raises:
            ValueError: If a function of one's own gives a tensor of another shape than it should.
        """
        tokens = view.tokens
        with torch.no_grad():  # which tokens are kept has no gradient, and the maps need not wait for one
            scores = None
            if self.rank is None or self.refill is None:
                iterations = self.iterations if self.rank is None else 0
                scores = self_attention_scores(
                    view.self_attention(), sample=self.sample, iterations=iterations, size=view.size, step=view.step
                )
            if self.rank is not None:
                importance = _checked(self.rank(view), tokens.shape[:2], "rank", self.rank)
            else:
                assert scores is not None
                assert scores.importance is not None
                importance = scores.importance
            importance = with_protected(importance, view.protected)
            keep = keep_most_important(importance, view.count, one_set=view.one_set)
            source = None if scores is None or self.refill is not None else scores.source(keep)
        refill = (
            partial(similarity_copy, source=source) if source is not None else partial(self._own, tokens, keep, view)
        )
        return Cut(gather_tokens(tokens, keep), keep, importance, refill)

    def _own(self, before: Tensor, keep: Tensor, view: View, kept: Tensor) -> Tensor:
        assert self.refill is not None
        filled = self.refill(ToRefill(kept, before, keep, view.size))
        return _checked(filled, (*before.shape[:2], kept.shape[2]), "refill", self.refill).to(kept.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values; a function of one's own becomes its qualified name."""
        spare = self.spare
        return {
            "method": "at-edm",
            "rate": self.rate,
            "where": where_name(self.where),
            "spare": {"share": spare.share, "pairing": spare.pairing}
            if isinstance(spare, Early)
            else spare and repr(spare),
            "rank": None if self.rank is None else function_name(self.rank),
            "refill": None if self.refill is None else function_name(self.refill),
            "sample": self.sample,
            "iterations": self.iterations,
        }


def _checked(found: Any, expected: tuple[int, ...], field: str, function: object) -> Tensor:
    """Raise unless a function of the user's own gave a tensor of the shape that is asked of it."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(expected):
        raise ValueError(f"{field} {function_name(function)} must give a tensor of {tuple(expected)}, not {shape}")
    return found  # type: ignore[no-any-return]


#: AT-EDM†: nothing is pruned at the second feature level.
DAGGER = AtEdm(where=not_second_level)
#: For SDXL-Turbo: supplement E says only what it saves, 33.4 %, and AT-EDM† in every step comes to that.
TURBO = replace(DAGGER, spare=None)
