import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atedm.method.contract import Place
from atedm.method.schedule import PAIRINGS, Early, spared_spans
from views import SDXL


@pytest.mark.parametrize(
    ("pairing", "down", "up"),
    [("F-F", 0, 0), ("F-M", 0, 1), ("F-L", 0, 2), ("L-F", 1, 0), ("L-M", 1, 1), ("L-L", 1, 2)],
)
def test_pairings_on_sdxl(pairing: str, down: int, up: int) -> None:
    expected = {f"down.1.{down}", f"down.2.{down}", f"up.0.{up}", f"up.1.{up}"}
    assert spared_spans(SDXL, Early(pairing=pairing)) == expected
    assert spared_spans(reversed(SDXL), Early(pairing=pairing)) == expected  # in any order, from any iterable


def test_first_last_is_the_default_and_all_six_pairings_differ() -> None:
    assert Early() == Early(share=0.3, pairing="F-L")
    assert len(PAIRINGS) == len({spared_spans(SDXL, Early(pairing=pairing)) for pairing in PAIRINGS}) == 6
    assert spared_spans(SDXL, None) == frozenset()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.dictionaries(st.tuples(st.sampled_from(["down", "up"]), st.integers(1, 4)), st.integers(1, 5)),
    pairing=st.sampled_from(PAIRINGS),
)
def test_one_span_of_every_stage_that_has_any(counts: dict[tuple[str, int], int], pairing: str) -> None:
    places = [
        Place(stage, level, i, count, 1, f"{stage}.{level}.{i}")
        for (stage, level), count in counts.items()
        for i in range(count)
    ]
    letters = dict(zip(["down", "up"], pairing.split("-"), strict=True))
    expected = {
        f"{stage}.{level}.{[0, count // 2, count - 1]['FML'.index(letters[stage])]}"
        for (stage, level), count in counts.items()
    }
    mid = Place("mid", 4, 0, 1, 1, "mid.0")
    assert spared_spans([*places, mid], Early(pairing=pairing)) == expected


@pytest.mark.parametrize("pairing", ["", "F", "M-L", "f-l", "L-F-M", None])
def test_an_unknown_pairing_is_refused_with_the_known_ones(pairing: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown pairing .* Known are 'F-L', 'F-F'"):
        Early(pairing=pairing)


@pytest.mark.parametrize(
    "change",
    [{"stage": "middle"}, {"level": 0}, {"index": 2}, {"index": -1}, {"layers": 0}, {"count": 0}],
)
def test_an_impossible_place_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"stage|level"):
        dataclasses.replace(SDXL[0], **change)  # type: ignore[arg-type]


def test_a_place_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SDXL[0].level = 3  # type: ignore[misc]


def early_steps(early: Early, steps: int) -> int:
    """How many of them are early; they come first."""
    found = [early.is_early(step / steps) for step in range(steps)]
    assert found == sorted(found, reverse=True)
    return sum(found)


def test_the_papers_fifty_steps() -> None:
    assert [Early().is_early(i / 50) for i in range(50)] == [True] * 15 + [False] * 35


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps=st.integers(1, 1000), percent=st.integers(0, 100))
def test_steps_are_counted_exactly(steps: int, percent: int) -> None:
    # Step i is early while i / steps < percent / 100, counted in fractions.
    exact = sum(Fraction(i, steps) < Fraction(percent, 100) for i in range(steps))
    assert early_steps(Early(percent / 100), steps) == exact


@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100, 250, 1000])
@pytest.mark.parametrize(
    ("tenths", "threshold"),
    # 0.1 * 3 is 0.30000000000000004, and 0.7 in float32 is 0.69999999.
    [(3, 0.1 * 3), (3, 3 / 10), (3, 15 / 50), (3, 1 - 0.7), (7, 0.7), (7, 0.1 * 7)],
)
def test_rounding_does_not_move_the_change_over(steps: int, tenths: int, threshold: float) -> None:
    first_normal = steps * tenths // 10
    for share in (first_normal / steps, 1 - (steps - first_normal) / steps, torch.tensor(first_normal / steps).item()):
        assert not Early(threshold).is_early(share)
    assert Early(threshold).is_early((first_normal - 1) / steps)


def test_the_whole_run_or_none_of_it() -> None:
    assert early_steps(Early(0.0), 7) == 0
    assert early_steps(Early(1.0), 7) == 7
    assert early_steps(Early(), 1) == 1  # a single step is the first


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, None, True, "0.3"])
def test_a_share_out_of_its_range_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"^share must be in \[0, 1\], not "):
        Early(share)
