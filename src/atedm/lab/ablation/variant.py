"""A variant of a method: every choice that the supplement and our own tables vary, by name.

`AtEdm` and `Matched` hold what a user needs. This holds the rest: where the tokens are ranked, dropped, matched and
refilled otherwise, dropped inside a layer or in several, or chosen once for several steps. It is a method like the
others, so that `atedm.apply`, costs and every experiment take it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from atedm.costs.spans import Macs, SpanShape, layer_macs, meta_overhead
from atedm.lab.ablation.choosing import RANKS, REFILLS, choose, drop, rank_tokens
from atedm.lab.ablation.map_modes import HEAD_FUSIONS, MAP_MODES
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Cut, Method, Place, View, Where
from atedm.method.keep import keep_count
from atedm.method.matched import Matched
from atedm.method.places import everywhere, where_name
from atedm.method.schedule import Early
from atedm.words import check_callable, check_name, check_pairs, check_rate, check_share, check_whole

#: Where in a layer the tokens are dropped (supplement A.2, C.1). Dropping before self-attention leaves nothing dense.
PLACES = ("after-feed-forward", "before-feed-forward", "after-self-attention", "before-self-attention")
#: What says which kept token a dropped one is refilled from.
MATCHES = ("attention", "euclidean", "cosine")
#: The paper's, its mirror (supplement C.5), and none.
SCHEDULES = ("prune-less-early", "prune-more-early", "constant")

_GRID_RANKS = ("lattice", "cells", "important-of-cells", "representative", "facility-location")


@dataclass(frozen=True)
class Variant:
    """One setting. The defaults are the paper's; `variant_of` gives those of any method.

    Raises:
        ValueError: If a value is out of its range, a name is unknown, or two choices do not go together.
    """

    rate: float = 0.63
    level_factors: tuple[tuple[int, float], ...] = ()
    where: Where = everywhere
    #: One of `atedm.lab.ablation.choosing.RANKS`.
    rank: str = "self-attention"
    #: One of `atedm.lab.ablation.map_modes.HEAD_FUSIONS`.
    head_fusion: str = "rms"
    iterations: int = 3
    #: One of `atedm.lab.ablation.map_modes.MAP_MODES`.
    map_mode: str = "auto"
    sampled_rows: int = 256
    #: One of `atedm.lab.ablation.choosing.REFILLS`.
    refill: str = "similarity-copy"
    #: One of `MATCHES`.
    match: str = "attention"
    #: Share of the kept tokens that cover, in the "representative" ranking.
    cover_share: float = 0.4
    #: Whether kept tokens go on as the mean of themselves and those that match them.
    merge: bool = False
    #: Whether self-attention counts a kept token as often as there are tokens that match it.
    counts: bool = False
    own_update_share: float = 0.0
    #: One of `PLACES`.
    place: str = "after-feed-forward"
    #: Several drops in place of one: (layer, rate) pairs, layers counted from 0, each rate a share of what reaches it.
    gradual: tuple[tuple[int, float], ...] = ()
    #: One of `SCHEDULES`.
    schedule: str = "prune-less-early"
    early_share: float = 0.3
    #: One of `atedm.method.schedule.PAIRINGS`.
    pairing: str = "F-L"
    #: For how many steps a block keeps its choice of tokens (supplement F).
    refresh_every: int = 1

    def __post_init__(self) -> None:
        """Check every value, and what does not go together."""
        check_rate("rate", self.rate)
        object.__setattr__(self, "level_factors", check_pairs("level_factors", self.level_factors))
        object.__setattr__(self, "gradual", _checked_layers(self.gradual))
        check_callable("where", self.where, "a predicate of a Place")
        for name, known in _NAMES.items():
            check_name(name, getattr(self, name), known)
        for name in ("cover_share", "own_update_share"):
            check_share(name, getattr(self, name))
        Early(self.early_share, self.pairing)
        for name in ("iterations", "sampled_rows", "refresh_every"):
            check_whole(name, getattr(self, name))
        for name in ("merge", "counts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        updates = self.refill == "matched-update"
        if (self.merge or self.own_update_share > 0) and not updates:
            raise ValueError(f"merge and own_update_share go with refill 'matched-update', not with {self.refill!r}")
        if self.counts and self.refill not in ("similarity-copy", "matched-update"):
            raise ValueError(f"counts needs matches, which refill {self.refill!r} does without")
        whole_grid = self.merge or self.counts or updates or self.refill == "bicubic" or self.rank in _GRID_RANKS
        if len(self.gradual) > 1 and whole_grid:
            raise ValueError("several drops a block go with rankings by attention or chance, and plain refills only")

    # --- what every method says

    @property
    def name(self) -> str:
        """Whether tokens are copied, as by the paper, or updated."""
        return "matched variant" if self.refill == "matched-update" else "AT-EDM variant"

    @property
    def dense_layers(self) -> int:
        """Layers before the drop, for a message where nothing can be pruned."""
        return self.drops[0][0] + int(self.place == "after-feed-forward")

    @property
    def remembers(self) -> bool:
        """Whether updates or choices are kept for the next step."""
        return self.own_update_share > 0 or self.refresh_every > 1

    def is_early(self, share: float) -> bool:
        """Whether a step spares some blocks."""
        if self.schedule == "constant":
            return False
        early = Early(self.early_share).is_early(share)
        return early == (self.schedule == "prune-less-early")

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        """Tokens left at the end of a block."""
        return min(self.counts_by_layer(place, tokens, early=early).values(), default=tokens)

    def drop(self, view: View) -> Cut:
        """Rank, choose and prepare the refill at one point."""
        ranking = rank_tokens(self, view)
        return drop(self, view, choose(self, view, ranking))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pairs = {name: [list(pair) for pair in values[name]] for name in ("level_factors", "gradual")}
        return {"method": "variant", **values, **pairs, "where": where_name(self.where)}

    # --- what only variants have

    @property
    def drops(self) -> tuple[tuple[int, float], ...]:
        """(layer, rate) of every drop."""
        return self.gradual or ((0, self.rate),)

    @property
    def ranks_by_words(self) -> bool:
        """Whether a mapping of cross-attention ranks."""
        return self.rank.startswith("cross-attention-")

    def counts_by_layer(self, place: Place, tokens: int, *, early: bool = False) -> dict[int, int]:
        """Tokens left after each layer of a block that drops any, by layer."""
        counts: dict[int, int] = {}
        spares = early and self.schedule != "constant" and Early(self.early_share, self.pairing).spares(place)
        if spares or not self.where(place):
            return counts
        factor = dict(self.level_factors).get(place.level, 1.0)
        end = place.layers - (self.place == "after-feed-forward")  # after which something runs on fewer tokens
        for layer, rate in self.drops:
            left = keep_count(tokens, factor * rate)
            if layer < end and left < tokens:
                tokens = counts[layer] = left
        return counts

    def span_macs(self, shape: SpanShape, *, early: bool = False, reuses: bool = False) -> Macs:
        """MACs of one block in one step; ``reuses``: it goes by a choice of tokens made before."""
        n, c = shape.tokens, shape.channels
        counts = self.counts_by_layer(shape.place, n, early=early)
        total = Macs(linear=2 * n * c * c)
        for layer in range(shape.place.layers):
            left = counts.get(layer, n)
            in_self = left if self.place == "before-self-attention" else n
            in_cross = left if self.place in ("after-self-attention", "before-self-attention") else n
            in_ff = n if self.place == "after-feed-forward" else left
            total = total.plus(layer_macs(shape, in_self, in_cross, in_ff))
            if left < n and not reuses:
                total = total.plus(Macs(overhead=meta_overhead(self._as_one_drop(), shape, left, tokens=n)))
            n = left
        return total

    def span_run_macs(self, shape: SpanShape, steps: int) -> Macs:
        """MACs of one block over a run. A choice lasts ``refresh_every`` steps, if the numbers do not change."""
        kinds: Counter[tuple[bool, bool]] = Counter()
        made = -self.refresh_every
        made_for: dict[int, int] = {}
        for step in range(steps):
            early = self.is_early(step / steps)
            left = self.counts_by_layer(shape.place, shape.tokens, early=early)
            reuses = bool(left) and step - made < self.refresh_every and made_for == left
            if left and not reuses:
                made, made_for = step, left
            kinds[early, reuses] += 1
        return Macs().plus(
            *(self.span_macs(shape, early=early, reuses=reuses).times(n) for (early, reuses), n in kinds.items())
        )

    def _as_one_drop(self) -> Variant:
        """The same without what does not matter for the cost of one drop."""
        return dataclasses.replace(self, rate=0.0, gradual=(), level_factors=(), where=everywhere)


_NAMES = {
    "rank": RANKS,
    "head_fusion": HEAD_FUSIONS,
    "map_mode": MAP_MODES,
    "refill": REFILLS,
    "match": MATCHES,
    "place": PLACES,
    "schedule": SCHEDULES,
}


def _checked_layers(pairs: Any) -> tuple[tuple[int, float], ...]:
    try:
        found = tuple((layer, rate) for layer, rate in pairs)
    except (TypeError, ValueError):
        raise ValueError(f"gradual must be (layer, rate) pairs, not {pairs!r}") from None
    for layer, rate in found:
        check_whole("a layer of gradual", layer, least=0)
        check_rate("a rate of gradual", rate)
    if [layer for layer, _ in found] != sorted({layer for layer, _ in found}):
        raise ValueError(f"the layers of gradual must ascend, each once: {found}")
    return found


def variant_of(method: Method) -> Variant:
    """Return the variant that does what ``method`` does, bit for bit.

    Raises:
        ValueError: If it has functions of one's own, or is of a class not known here.
    """
    if isinstance(method, Variant):
        return method
    if isinstance(method, Matched):
        return Variant(
            rate=method.rate,
            level_factors=method.level_factors,
            where=method.where,
            rank="representative",
            refill="matched-update",
            match="euclidean",
            cover_share=method.cover_share,
            merge=True,
            counts=True,
            own_update_share=method.own_update_share,
            place="before-self-attention",
            schedule="constant",
        )
    if not isinstance(method, AtEdm) or method.rank is not None or method.refill is not None:
        raise ValueError(
            f"a variant is made of an AtEdm or a Matched without functions of one's own, not of {method!r}"
        )
    if method.spare is not None and type(method.spare) is not Early:
        raise ValueError(f"a variant knows no schedule of one's own, such as {method.spare!r}")
    spare = method.spare or Early()
    return Variant(
        rate=method.rate,
        where=method.where,
        iterations=method.iterations,
        map_mode="full" if method.sample is None else "auto",
        sampled_rows=method.sample or 256,
        schedule="constant" if method.spare is None else "prune-less-early",
        early_share=spare.share,
        pairing=spare.pairing,
    )
