"""What the fields of a pruning config may be set to, by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from atedm.schedule import BlockPlace

#: Says of each attention block whether it may be pruned.
Where: TypeAlias = Callable[[BlockPlace], bool]
#: A function in place of a name, from outside of the package; docs/extending.md shows what each is given and returns.
Own: TypeAlias = Callable[..., Any]
#: Fields of a pruning config that may be one.
OWN_FIELDS = ("ranking", "map_mode", "recovery", "schedule")

#: How tokens are ranked: G-WPR on the self-attention map (the paper's default) or on the cross-attention map with one
#: of four mapping functions (supplement C.2); three controls, of which one keeps the least important tokens; and those
#: that cover the image (`atedm.coverage`), of which "representative" is our own method's.
RANKINGS = (
    "self-attention",
    "self-attention-reversed",
    "cross-attention-entropy",
    "cross-attention-hard-clip",
    "cross-attention-soft-clip",
    "cross-attention-power",
    "attention-received",
    "uniform-random",
    "lattice",
    "cells",
    "important-of-cells",
    "representative",
    "facility-location",
)
#: Those whose order is over the whole grid.
COVERS = ("lattice", "cells", "important-of-cells", "representative", "facility-location")
#: How dropped positions are refilled after the block: the paper's copy and its baselines (main paper; supplement A.6),
#: own value plus the update of a match, plus a weighted mean of all updates, or plus the own update of the last step.
RECOVERIES = (
    "similarity-copy",
    "zero-padding",
    "bicubic",
    "direct-copy",
    "matched-update",
    "weighted-update",
    "last-update",
)
#: What says which kept token a dropped one is refilled from: the attention map down the dropped token's column (the
#: paper's), along its row, the cosine or the Euclidean distance of features, or the distance in the grid.
SIMILARITIES = ("attention", "attention-transposed", "cosine", "euclidean", "distance")
#: Those that refill from other tokens.
BY_SIMILARITY = ("similarity-copy", "matched-update", "weighted-update", "last-update")
#: Those that refill from one other token.
BY_MATCH = ("similarity-copy", "matched-update", "last-update")
#: Those that add an update to a token's own value.
UPDATES = ("matched-update", "weighted-update", "last-update")
#: Those that add the token's own update of the step before; in the first step there is only that of its match.
OWN_UPDATES = ("last-update",)
#: Ways to what the self-attention map is wanted for: see `atedm.map_modes`. "auto" goes by the number of tokens.
MAP_MODES = ("auto", "full", "blocked", "flash", "triton", "sampled")
#: Up to so many tokens "auto" makes the whole map, which takes little there; above it a sample.
AUTO_FULL_TOKENS = 1024
#: Whose map a copy by attention goes by: that of the layer that drops the token, or of the first layer of the block.
COPY_MAPS = ("own", "first")
#: Whether both halves of a guided batch keep the same tokens.
GUIDANCE_MASKS = ("separate", "shared")
#: Where in a layer the tokens are dropped (supplement A.2, C.1).
#: "before-self-attention" leaves nothing of the layer dense, so from the first layer on the whole block is pruned.
PLACES = ("after-feed-forward", "before-feed-forward", "after-self-attention", "before-self-attention")


def everywhere(block: BlockPlace) -> bool:
    """Prune every attention block: the paper's AT-EDM."""
    return True


def not_second_level(block: BlockPlace) -> bool:
    """Prune all but the second feature level: the paper's AT-EDM†."""
    return block.level != 2


def only_second_level(block: BlockPlace) -> bool:
    """Prune the second feature level alone: what AT-EDM does and AT-EDM† does not."""
    return block.level == 2


#: The predicates that have a name.
WHERES: dict[str, Where] = {
    "everywhere": everywhere,
    "not-second-level": not_second_level,
    "only-second-level": only_second_level,
}


def draws_in_few_steps(model: str) -> bool:
    """Whether a model is made for few steps, by the last part of its name.

    Of a U-Net in a folder that part is the pipeline's, of one in the cache of the hub that of its repository.
    """
    return bool(re.search(r"turbo|lightning|hyper[-_ ]?sd|(?<![a-z])(lcm|tcd)", own_name(model), re.IGNORECASE))


def own_name(model: str) -> str:
    """Return what a model is called, of a name, a folder or a folder in the cache of the hub, a part's or its whole."""
    parts = [*Path(model).parts]
    if len(parts) > 1 and parts[-1] in ("unet", "controlnet"):
        parts.pop()
    if len(parts) > 2 and parts[-2] == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else model


def name_of(function: Own) -> str:
    """Return the module and the qualified name of a function, or what it prints as where it has none."""
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}" if name else repr(function)


def check_name(what: str, name: object, known: Iterable[str]) -> None:
    """Raise a `ValueError` that names the nearest known word, unless ``name`` is known."""
    words = list(known)
    if name in words:
        return
    near = difflib.get_close_matches(str(name), words, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} Known are {', '.join(map(repr, words))}.")
