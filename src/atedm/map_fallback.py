"""Where memory runs out for a map, make the same figures in blocks of it and say so."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from atedm.choices import Own

T = TypeVar("T")

SMALLEST = "blocked"
"""The exact mode that needs the least memory."""


def with_memory_there_is(rank: Callable[[str | Own], T], mode: str | Own, *, can_be_smaller: bool) -> T:
    """Return ``rank(mode)``, or ``rank("blocked")`` if memory runs out, which is logged once a mode.

    The two differ by the order of sums. The next call tries ``mode`` again: what else took the memory may be gone.
    Under `torch.compile` nothing is caught, because memory is taken when the whole graph runs.

    Args:
        rank: What makes and uses the map.
        mode: The map mode that was asked for.
        can_be_smaller: Whether the same can be had without a whole map.

    Raises:
        RuntimeError: As ``rank``, if there is no smaller mode that gives the same.
    """
    exact = isinstance(mode, str) and mode not in (SMALLEST, "sampled")
    if not exact or not can_be_smaller or torch.compiler.is_compiling():
        return rank(mode)
    try:
        return rank(mode)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
    # Past the handler, where nothing holds on to what the attempt had made.
    _say_once(str(mode), reason)
    return rank(SMALLEST)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the system had no memory to give."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@functools.cache
def _say_once(mode: str, reason: str) -> None:
    logging.getLogger("atedm").warning(
        "no memory for attention maps in map_mode %r (%s); going on in %r, which takes less and more time. "
        "Name it to spare the attempt.",
        mode,
        reason,
        SMALLEST,
    )
