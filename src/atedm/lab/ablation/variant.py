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

from atedm.costs.macs import Macs, SpanShape, layer_macs
from atedm.costs.spans import meta_overhead
from atedm.lab.ablation.choosing import choose, drop, rank_tokens
from atedm.lab.ablation.settings import Settings
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Cut, Method, Place, View
from atedm.method.keep import keep_count
from atedm.method.matched import Matched
from atedm.method.places import everywhere, where_name
from atedm.method.schedule import Early


@dataclass(frozen=True)
class Variant(Settings):
    """A method with `Settings`. The defaults are the paper's; `variant_of` gives those of any method."""

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

    def why_no_transformer(self) -> str | None:
        """Say what a transformer cannot do of this, whose blocks run whole; None if it can do all of it."""
        if self.place not in ("after-feed-forward", "before-self-attention"):
            return f"place={self.place} is inside a layer"
        if self.ranks_by_words:
            return f"rank={self.rank} reads cross-attention"
        if self.gradual or self.refresh_every > 1:
            return "a transformer drops once, and anew in every step"
        return None

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
        one_drop = dataclasses.replace(self, rate=0.0, gradual=(), level_factors=(), where=everywhere)
        if shape.place.is_stretch:
            left, dense = min(counts.values(), default=n), self.dense_layers if counts else shape.place.layers
            overhead = meta_overhead(one_drop, shape, left, tokens=n) if counts else 0
            layers = shape.layers_macs(0, dense, n), shape.layers_macs(dense, shape.place.layers, left)
            return Macs(overhead=overhead).plus(*layers)
        total = Macs(linear=2 * n * c * c)
        for layer in range(shape.place.layers):
            left = counts.get(layer, n)
            in_self = left if self.place == "before-self-attention" else n
            in_cross = left if self.place in ("after-self-attention", "before-self-attention") else n
            in_ff = n if self.place == "after-feed-forward" else left
            total = total.plus(layer_macs(shape, in_self, in_cross, in_ff))
            if left < n and not reuses:
                total = total.plus(Macs(overhead=meta_overhead(one_drop, shape, left, tokens=n)))
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


def variant_of(method: Method) -> Variant:
    """Return the variant that does what ``method`` does, bit for bit.

    Raises a `ValueError` if it has functions of one's own, or is of a class not known here.
    """
    if isinstance(method, Variant):
        return method
    if isinstance(method, Matched):
        if method.dense_share:
            raise ValueError("a variant has no dense steps at first, as matched pruning of transformers has")
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
