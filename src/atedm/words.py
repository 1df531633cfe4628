"""Checks of values and names, with errors that say what was found and what would work."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable


def check_name(what: str, name: object, known: Iterable[str]) -> None:
    """Raise a `ValueError` that names the nearest known word, unless ``name`` is known."""
    words = list(known)
    if name in words:
        return
    near = difflib.get_close_matches(str(name), words, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}? Known are {', '.join(map(repr, words))}." if near else "; none is known here."
    raise ValueError(f"unknown {what} {name!r}{hint}")


def is_whole(value: object) -> bool:
    """Whether it is an integer, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_rate(what: str, rate: object) -> None:
    """Raise a `ValueError` unless it is a share of tokens to drop, in [0, 1)."""
    if not (is_number(rate) and 0 <= rate < 1):  # type: ignore[operator]
        raise ValueError(f"{what} must be in [0, 1), the share of tokens to drop, not {rate!r}")


def check_share(what: str, share: object) -> None:
    """Raise a `ValueError` unless it is in [0, 1]."""
    if not (is_number(share) and 0 <= share <= 1):  # type: ignore[operator]
        raise ValueError(f"{what} must be in [0, 1], not {share!r}")


def check_whole(what: str, value: object, least: int = 1) -> None:
    """Raise a `ValueError` unless it is an integer of at least ``least``."""
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise ValueError(f"{what} must be a whole number of at least {least}, not {value!r}")


def check_callable(what: str, value: object, expected: str) -> None:
    """Raise a `ValueError` that says what is expected, unless it can be called."""
    if not callable(value):
        raise ValueError(f"{what} must be {expected}, not {value!r}")


def check_pairs(what: str, pairs: object) -> tuple[tuple[int, float], ...]:
    """Return (level, factor) pairs as a tuple, which may have been read from JSON as lists.

    Raises:
        ValueError: If they are none, a level is below 1 or comes twice, or a factor is not in [0, 1].
    """
    try:
        found = tuple((level, factor) for level, factor in pairs)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be (level, factor) pairs, not {pairs!r}") from None
    for level, factor in found:
        check_whole(f"a level of {what}", level)
        check_share(f"a factor of {what}", factor)
    if any(a[0] >= b[0] for a, b in itertools.pairwise(found)):
        raise ValueError(f"the levels of {what} must ascend, each once: {found}")
    return found
