"""What a forecast step takes for the output of the model: the line through the last two outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def extrapolated(given: Sequence[tuple[int, Tensor]], step: int) -> Tensor:
    """Return the output at a step on the line through the two before it, or the last one where there is one only.

    Args:
        given: Step and output of one or two calls, the older one first.
        step: Which output is asked for.
    """
    (before, older), (now, newer) = given[0], given[-1]
    if before == now:
        return newer
    return newer + (newer - older) * ((step - now) / (now - before))
