"""Whether a method keeps enough tokens for those that must not be dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from atedm.method.contract import Method, Place
from atedm.method.keep import is_exporting
from atedm.method.protection import protected_tokens


def check_room(method: Method, grids: Mapping[Place, tuple[int, int]], protect: Tensor) -> None:
    """See that no span keeps fewer tokens than are protected, early or not.

    Args:
        method: What prunes.
        grids: (h, w) of every span.
        protect: (H, W) zeros and ones over the image.

    Raises:
        ValueError: If one does; the message names a rate that leaves enough in all of them. Or if a graph is being
            made, in which the region cannot be read.
    """
    if is_exporting():
        raise ValueError(
            "a region is protected, and whether it leaves room is not known for this size of latents; "
            "call the atedm.FixedPhase once with its inputs before torch.export.export"
        )
    lacking, highest = "", 1.0  # the first span that lacks room, and what the rate may be multiplied by for all
    for place, grid in grids.items():
        tokens = grid[0] * grid[1]
        protected = int(protected_tokens(protect, grid).sum())
        left = min(method.count(place, tokens, early=early) for early in (False, True))
        if left < protected:
            lacking = lacking or (
                f"{protected} of the {tokens} tokens of {place.name} are protected, and only {left} are kept"
            )
            highest = min(highest, (tokens - protected) / max(1, tokens - left))
    if lacking:
        raise ValueError(f"{lacking}; protect less, or give a rate of {math.floor(100 * highest * method.rate) / 100}")
