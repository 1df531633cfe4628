"""Inputs of every kind for what reads files and names: each is read, or refused by an error of our own.

`ATEDM_FUZZ_SECONDS=600 pytest -n 0 -s -k fuzz` spends ten minutes on each reader; in every test run it has a second or
two.
"""

from __future__ import annotations

import json
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import atedm
from faults import broken

SECONDS = float(os.environ.get("ATEDM_FUZZ_SECONDS", "1.5"))
OURS = Path(atedm.__file__).parent

NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 0.5, 1.0, 2**63, 1e308, float("nan"), float("inf")])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def fuzzed(reader: str, inputs: st.SearchStrategy[Any], read: Callable[[Any], Any]) -> None:
    """Read inputs until the time is over; each is read, or refused by a `raise` of ours with a line to show."""
    over = time.monotonic() + SECONDS
    counts: Counter[str] = Counter()
    number = 0
    while time.monotonic() < over:
        number += 1

        @seed(number)
        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=[*HealthCheck])
        @given(inputs)
        def once(value: Any) -> None:
            counts["all"] += 1
            try:
                read(value)
            except (ValueError, TypeError, OSError) as refused:
                error = refused
            else:
                return
            counts["refused"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            meant = Path(last.filename).is_relative_to(OURS) and (last.line or "").startswith("raise ")
            assert meant, f"{type(error).__name__} by chance: {error}"
            assert str(error).strip()

        once()
    print(f"\n{reader}: {dict(counts)}")


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """Return plain JSON values, some of which were replaced, left out or added at any depth."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while isinstance(place, (dict, list)) and place:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
                how = draw(st.sampled_from(["replace", "drop", "add"]))
                if how == "replace":
                    place[key] = draw(VALUES)
                elif how == "drop":
                    del place[key]
                elif isinstance(place, dict):
                    place[draw(st.text(max_size=8))] = draw(VALUES)
                else:
                    place.append(draw(VALUES))
                break
            place = place[key]
    return content


def json_bytes(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """JSON of what another strategy gives."""
    return strategy.map(lambda content: json.dumps(content).encode())


def bytes_of(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a file that something happened to."""
    damaged = st.integers(0, 2**32).map(lambda number: broken(whole, random.Random(number)))
    return st.one_of(damaged, st.binary(max_size=200), st.just(whole))
