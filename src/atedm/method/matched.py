"""Matched pruning, our own: keep tokens that represent the others, and refill by the update of the match.

In every attention block and every step, before the first layer:

1. **Cover.** 40 % of the tokens that are kept come from a lattice over the grid that moves with the step.
2. **Represent.** The others are those that are least like the cover, by the Euclidean distance of features.
3. **Match.** Each dropped token belongs to the kept token nearest to it.
4. **Go on** as the mean of the group. Self-attention counts a kept token as often as there are tokens in its group.
5. **Refill.** After the last layer each token of a group is what it was before, plus what the block did to the mean.
   What a fit on the model's own runs says is added (`atedm.method.correction`), if there is one.
6. **Remember.** Half of what set a token's update apart from its group's in the last step is added.

It needs no attention map, and prunes the first layer too. ``docs/explanation/matched.md`` has the reasons and the
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atedm.method.contract import Cut, Memory, Place, View, Where
from atedm.method.correction import Corrector, Refill
from atedm.method.cover import lattice, representative
from atedm.method.keep import keep_count, keep_most_important
from atedm.method.matching import match_by_features
from atedm.method.places import everywhere, where_name
from atedm.method.protection import with_protected
from atedm.method.recovery import group_sizes, mean_by_source, update_of_match, with_own_update
from atedm.words import check_callable, check_pairs, check_rate, check_share

FIRST_STEP = 0.001
"""As a `Matched.dense_share`: the first step alone, in runs of up to a thousand steps."""
DENSE_SHARES = (0.3, FIRST_STEP, 0.0)
"""Shares of a run to try, the gentlest first."""
_TOLERANCE = 1e-6
"""Below this, two shares of a run are one."""


@dataclass(frozen=True)
class Matched:
    """Matched pruning. ``rate`` is the one slider.

        >>> Matched().count(Place("down", 2, 0, 2, 2, "down_blocks.1.attentions.0"), 4096)
        1803

    Raises:
        ValueError: If a value is out of its range.
    """

    #: Share of the tokens dropped in a block, in [0, 1).
    rate: float = 0.7
    #: Which blocks: a predicate of a `Place`.
    where: Where = everywhere
    #: What the rate is multiplied by in the blocks of a feature level: (level, factor) pairs, factors in [0, 1].
    #: The second level of a U-Net bears less.
    level_factors: tuple[tuple[int, float], ...] = ((2, 0.8),)
    #: Share of the kept tokens that cover the grid; the others are those least like the cover.
    cover_share: float = 0.4
    #: How much of what set a token's last update apart from its group's is added, in [0, 1]. 0 remembers nothing.
    own_update_share: float = 0.5
    #: Share of the run, at its beginning, in which nothing is dropped. Dense steps leave each token its own update.
    dense_share: float = 0.0
    #: What a fit found that the refill gets wrong: see `atedm.fit`, whose plans set it.
    correction: Corrector | None = field(default=None, repr=False)

    dense_layers = 0
    name = "Matched pruning"

    def __post_init__(self) -> None:
        """Check every value."""
        check_rate("rate", self.rate)
        check_callable("where", self.where, "a predicate of a Place, such as atedm.not_second_level")
        object.__setattr__(self, "level_factors", check_pairs("level_factors", self.level_factors))
        check_share("cover_share", self.cover_share)
        check_share("own_update_share", self.own_update_share)
        check_share("dense_share", self.dense_share)
        if self.correction is not None:
            check_callable("correction", self.correction, "what atedm.fit found")

    @property
    def remembers(self) -> bool:
        """Whether updates are kept for the next step."""
        return self.own_update_share > 0

    def is_early(self, share: float) -> bool:
        """Whether nothing is dropped in a step before which ``share`` of the run is done; all others prune alike."""
        return share < self.dense_share - _TOLERANCE

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        """Tokens that the whole span runs on."""
        if (early and self.dense_share > 0) or not self.where(place):
            return tokens
        return keep_count(tokens, dict(self.level_factors).get(place.level, 1.0) * self.rate)

    def drop(self, view: View) -> Cut:
        """Choose, match and merge. See the head of this file."""
        tokens = view.tokens
        with torch.no_grad():  # who is kept and whom a token is like has no gradient
            cover = lattice(view.size, step=view.step, device=tokens.device)
            importance = with_protected(representative(tokens, cover, view.count, self.cover_share), view.protected)
            keep = keep_most_important(importance, view.count, one_set=view.one_set)
            source = match_by_features(tokens, keep).source
            sizes = group_sizes(source, view.count)
        start = mean_by_source(tokens, source, sizes)
        return Cut(start, keep, importance, partial(self._refill, view, start, source), weights=sizes)

    def _refill(self, view: View, start: Tensor, source: Tensor, kept: Tensor) -> Tensor:
        """Give (B, N, C) from the kept tokens (B, K, C) after the last layer."""
        before, memory = view.tokens, view.memory if self.remembers else None
        update = update_of_match(kept, start, source)
        last = None if memory is None or memory.last is None or memory.last.shape != update.shape else memory.last
        added = None
        if self.correction is not None:
            added = self.correction(Refill(view.place.name, view.step, before, start, kept, source, last))
        by_memory = update
        if last is not None and (added is None or added[1] is not True):
            by_memory = with_own_update(update, last, source, kept.shape[1], self.own_update_share)
        update = by_memory if added is None else _where(added[1], update + added[0], by_memory)
        if memory is not None:
            memory.store(update.detach().to(kept.dtype))
        return (before.to(update.dtype) + update).to(kept.dtype)

    def remember_dense(self, before: Tensor, after: Tensor, memory: Memory) -> None:
        """Remember what a span that dropped nothing did to each of its tokens, (B, N, C) before and after."""
        dtype = torch.promote_types(after.dtype, torch.float32)
        memory.store((after.detach().to(dtype) - before.detach().to(dtype)).to(after.dtype))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values; a predicate of one's own becomes its qualified name."""
        return {
            "method": "matched",
            "rate": self.rate,
            "where": where_name(self.where),
            "level_factors": [list(pair) for pair in self.level_factors],
            "cover_share": self.cover_share,
            "own_update_share": self.own_update_share,
            "dense_share": self.dense_share,
        }


def _where(holds: bool | Tensor, this: Tensor, other: Tensor) -> Tensor:
    return this if holds is True else torch.where(torch.as_tensor(holds, device=this.device), this, other)
