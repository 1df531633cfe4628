"""The settings of a variant, by name, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atedm.lab.ablation.map_modes import HEAD_FUSIONS, MAP_MODES
from atedm.lab.ablation.mappings import MAPPINGS
from atedm.method.contract import Where
from atedm.method.places import everywhere
from atedm.method.schedule import Early
from atedm.words import check_callable, check_name, check_pairs, check_rate, check_share, check_whole

#: G-WPR on self-attention (the paper's), its reverse, G-WPR on cross-attention by four mappings (supplement C.2),
#: controls, and rankings that cover the grid.
RANKS = (
    "self-attention",
    "self-attention-reversed",
    *(f"cross-attention-{name}" for name in MAPPINGS),
    "attention-received",
    "uniform-random",
    "lattice",
    "cells",
    "important-of-cells",
    "representative",
    "facility-location",
)
#: The paper's copy, its baselines (supplement A.6), and the update of the match.
REFILLS = ("similarity-copy", "zero-padding", "bicubic", "direct-copy", "matched-update")
#: Where in a layer the tokens are dropped (supplement A.2, C.1). Dropping before self-attention leaves nothing dense.
PLACES = ("after-feed-forward", "before-feed-forward", "after-self-attention", "before-self-attention")
#: What says which kept token a dropped one is refilled from.
MATCHES = ("attention", "euclidean", "cosine")
#: The paper's, its mirror (supplement C.5), and none.
SCHEDULES = ("prune-less-early", "prune-more-early", "constant")

_GRID_RANKS = ("lattice", "cells", "important-of-cells", "representative", "facility-location")


@dataclass(frozen=True)
class Settings:
    """One setting. The defaults are the paper's; `variant_of` gives those of any method.

    Raises a `ValueError` if a value is out of its range, a name is unknown, or two choices do not go together.
    """

    rate: float = 0.63
    level_factors: tuple[tuple[int, float], ...] = ()
    where: Where = everywhere
    rank: str = "self-attention"  #: One of `RANKS`.
    head_fusion: str = "rms"  #: One of `atedm.lab.ablation.map_modes.HEAD_FUSIONS`.
    iterations: int = 3
    map_mode: str = "auto"  #: One of `atedm.lab.ablation.map_modes.MAP_MODES`.
    sampled_rows: int = 256
    refill: str = "similarity-copy"  #: One of `REFILLS`.
    match: str = "attention"  #: One of `MATCHES`.
    cover_share: float = 0.4  #: Share of the kept tokens that cover, in the "representative" ranking.
    merge: bool = False  #: Whether kept tokens go on as the mean of themselves and those that match them.
    counts: bool = False  #: Whether self-attention counts a kept token as often as there are tokens that match it.
    own_update_share: float = 0.0
    place: str = "after-feed-forward"  #: One of `PLACES`.
    #: Several drops in place of one: (layer, rate) pairs, layers counted from 0, each rate a share of what reaches it.
    gradual: tuple[tuple[int, float], ...] = ()
    schedule: str = "prune-less-early"  #: One of `SCHEDULES`.
    early_share: float = 0.3
    pairing: str = "F-L"  #: One of `atedm.method.schedule.PAIRINGS`.
    refresh_every: int = 1  #: For how many steps a block keeps its choice of tokens (supplement F).

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

    @property
    def drops(self) -> tuple[tuple[int, float], ...]:
        """(layer, rate) of every drop."""
        return self.gradual or ((0, self.rate),)

    @property
    def ranks_by_words(self) -> bool:
        """Whether a mapping of cross-attention ranks."""
        return self.rank.startswith("cross-attention-")


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
