"""What a pruning config must be: checked when one is made, before anything is done by it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from atedm.choices import (
    BY_MATCH,
    BY_SIMILARITY,
    COPY_MAPS,
    COVERS,
    GUIDANCE_MASKS,
    MAP_MODES,
    OWN_FIELDS,
    PLACES,
    RANKINGS,
    RECOVERIES,
    SIMILARITIES,
    WHERES,
    check_name,
)
from atedm.ranking import HEAD_FUSIONS
from atedm.schedule import PAIRINGS, SCHEDULES

if TYPE_CHECKING:
    from atedm.config import PruningConfig

_NAMES = {
    "place": PLACES,
    "ranking": RANKINGS,
    "head_fusion": HEAD_FUSIONS,
    "recovery": RECOVERIES,
    "similarity": SIMILARITIES,
    "copy_map": COPY_MAPS,
    "guidance_masks": GUIDANCE_MASKS,
    "schedule": SCHEDULES,
    "unpruned_blocks": PAIRINGS,
    "map_mode": MAP_MODES,
}
_SWITCHES = ("merge", "proportional_attention", "rematch")
_SHARES = ("prune_less_share", "importance_share", "cover_share", "own_update_share")


def check_config(config: PruningConfig) -> None:
    """Raise a `ValueError` that names what is wrong with a config and what would do."""
    _check_rates(config)
    if isinstance(config.where, str):
        check_name("where", config.where, WHERES)
    elif not callable(config.where):
        raise ValueError(f"where must be a name or a predicate of a BlockPlace, not {config.where!r}")
    for name, known in _NAMES.items():
        if not (name in OWN_FIELDS and callable(getattr(config, name))):
            check_name(name, getattr(config, name), known)
    if config.reuse_place is not None:
        check_name("reuse_place", config.reuse_place, PLACES)
    for name in _SHARES:
        _check_share(name, getattr(config, name))
    if config.prune_less_factor is not None:
        _check_share("prune_less_factor", config.prune_less_factor)
    for name in ("iterations", "refresh_every", "sampled_rows"):
        if not is_whole(getattr(config, name)) or getattr(config, name) < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(config, name)!r}")
    if config.match_window is not None and (not is_whole(config.match_window) or config.match_window < 1):
        raise ValueError(f"match_window must be a whole number of at least 1, not {config.match_window!r}")
    for name in ("tolerance", "beta"):
        value = getattr(config, name)
        if value is not None and not (is_number(value) and value > 0):
            raise ValueError(f"{name} must be a number above 0 or None, not {value!r}")
    for name in ("eta", "alpha"):
        if not (is_number(getattr(config, name)) and getattr(config, name) > 0):
            raise ValueError(f"{name} must be a number above 0, not {getattr(config, name)!r}")
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, not {getattr(config, name)!r}")
    if not is_whole(config.seed):
        raise ValueError(f"seed must be a whole number, not {config.seed!r}")
    _check_grid(config)
    _check_refill(config)
    _check_memory(config)


def checked_pairs(name: str, pairs: object) -> tuple[tuple[int, float], ...]:
    """Return ``pairs`` as a tuple of (layer or level, number), which may have been read from JSON as lists.

    Raises:
        ValueError: If they are none.
    """
    try:
        return tuple((index, number) for index, number in pairs)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        what = "layer, rate" if name == "gradual" else "level, factor"
        raise ValueError(f"{name} must be ({what}) pairs, not {pairs!r}") from None


def _check_rates(config: PruningConfig) -> None:
    _check_rate("pruning_rate", config.pruning_rate)
    for layer, rate in config.gradual:
        if not is_whole(layer) or layer < 0:
            raise ValueError(f"a layer of gradual must be a whole number from 0, not {layer!r}")
        _check_rate("a rate of gradual", rate)
    for level, factor in config.level_factors:
        if not is_whole(level) or level < 1:
            raise ValueError(f"a level of level_factors must be a whole number from 1, not {level!r}")
        _check_share("a factor of level_factors", factor)
    for name, what, pairs in (("gradual", "layers", config.gradual), ("level_factors", "levels", config.level_factors)):
        if any(a[0] >= b[0] for a, b in itertools.pairwise(pairs)):
            raise ValueError(f"the {what} of {name} must ascend, each once: {pairs}")


def _check_grid(config: PruningConfig) -> None:
    """Check what needs every token of the grid."""
    needs = {
        "bicubic recovery": config.recovery == "bicubic",
        f"ranking {config.ranking!r}": config.ranking in COVERS,
        "similarity 'distance'": config.similarity == "distance" and config.recovery in BY_SIMILARITY,
        "match_window": config.match_window is not None,
        "an own update": config.remembers_updates,
    }
    for what, is_asked in needs.items():
        if is_asked and len(config.gradual) > 1:
            raise ValueError(f"{what} needs a whole grid of tokens, so it allows one pruning layer a block")


def _check_refill(config: PruningConfig) -> None:
    """Check that the ways to refill go together."""
    if config.recovery == "weighted-update" and config.matches_by_features:
        raise ValueError(f"weighted-update weighs by attention or by distance, not by {config.similarity!r}")
    if config.match_window is not None and config.similarity not in ("cosine", "euclidean"):
        raise ValueError(f"match_window is for matches by features, not by {config.similarity}")
    if config.merge and config.recovery not in ("matched-update", "last-update"):
        raise ValueError(
            f"merge is undone by an update of one match alone, not by recovery {config.recovery!r}; turn it off"
        )
    if config.proportional_attention and config.recovery not in BY_MATCH:
        raise ValueError(f"proportional_attention needs matches, which recovery {config.recovery!r} does without")


def _check_memory(config: PruningConfig) -> None:
    """Check what lasts from step to step."""
    if config.reuse_place is not None and config.refresh_every == 1:
        raise ValueError("reuse_place is for steps that reuse a choice of tokens; set refresh_every above 1")
    if config.rematch and not (config.refresh_every > 1 and config.matches_by_features):
        raise ValueError("rematch is for steps that reuse a kept set (refresh_every above 1) and matches by features")
    if config.refresh_every > 1 and config.recovery == "weighted-update" and config.similarity != "distance":
        raise ValueError("weighted-update by attention needs the whole map of each step; set refresh_every to 1")
    if config.own_update_share > 0 and config.recovery != "matched-update":
        raise ValueError(f"own_update_share is for recovery 'matched-update', not for {config.recovery!r}; set it to 0")


def is_whole(value: object) -> bool:
    """Whether it is an integer, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number, which True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rate(what: str, rate: object) -> None:
    if not (is_number(rate) and 0 <= rate < 1):  # type: ignore[operator]
        raise ValueError(f"{what} must be in [0, 1), the share of tokens to drop, not {rate!r}")


def _check_share(what: str, share: object) -> None:
    if not (is_number(share) and 0 <= share <= 1):  # type: ignore[operator]
        raise ValueError(f"{what} must be in [0, 1], not {share!r}")
