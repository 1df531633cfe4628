import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atedm.schedule import PAIRINGS, SCHEDULES, BlockPlace, is_prune_less, prune_less_blocks, prune_less_steps

# SD-XL: two blocks in each down stage, three in each up stage, none at the first level (supplement Fig. 3).
SDXL = [
    *[BlockPlace("down", 2, i, 2, 2, f"down.1.{i}") for i in range(2)],
    *[BlockPlace("down", 3, i, 2, 10, f"down.2.{i}") for i in range(2)],
    BlockPlace("mid", 3, 0, 1, 10, "mid.0"),
    *[BlockPlace("up", 3, i, 3, 10, f"up.0.{i}") for i in range(3)],
    *[BlockPlace("up", 2, i, 3, 2, f"up.1.{i}") for i in range(3)],
]


@pytest.mark.parametrize(
    ("pairing", "down", "up"),
    [("F-F", 0, 0), ("F-M", 0, 1), ("F-L", 0, 2), ("L-F", 1, 0), ("L-M", 1, 1), ("L-L", 1, 2)],
)
def test_pairings_on_sdxl(pairing: str, down: int, up: int) -> None:
    expected = {f"down.1.{down}", f"down.2.{down}", f"up.0.{up}", f"up.1.{up}"}
    assert prune_less_blocks(SDXL, pairing) == expected
    assert prune_less_blocks(reversed(SDXL), pairing) == expected  # in any order, from any iterable


def test_first_last_is_the_default_and_all_six_pairings_differ() -> None:
    assert prune_less_blocks(SDXL) == prune_less_blocks(SDXL, "F-L")
    assert isinstance(prune_less_blocks(SDXL), frozenset)
    assert len(PAIRINGS) == len({prune_less_blocks(SDXL, pairing) for pairing in PAIRINGS}) == 6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.dictionaries(st.tuples(st.sampled_from(["down", "up"]), st.integers(1, 4)), st.integers(1, 5)),
    pairing=st.sampled_from(PAIRINGS),
)
def test_one_block_of_every_stage_that_has_any(counts: dict[tuple[str, int], int], pairing: str) -> None:
    places = [
        BlockPlace(stage, level, i, count, 1, f"{stage}.{level}.{i}")  # type: ignore[arg-type]
        for (stage, level), count in counts.items()
        for i in range(count)
    ]
    letters = dict(zip(["down", "up"], pairing.split("-"), strict=True))
    expected = {
        f"{stage}.{level}.{[0, count // 2, count - 1]['FML'.index(letters[stage])]}"
        for (stage, level), count in counts.items()
    }
    mid = BlockPlace("mid", 4, 0, 1, 1, "mid.0")
    assert prune_less_blocks([*places, mid], pairing) == expected


@pytest.mark.parametrize("pairing", ["", "F", "M-L", "f-l", "L-F-M"])
def test_an_unknown_pairing_is_refused(pairing: str) -> None:
    with pytest.raises(ValueError, match="F-L"):
        prune_less_blocks(SDXL, pairing)


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


def test_the_papers_fifty_steps() -> None:
    early = [is_prune_less(i / 50) for i in range(50)]
    assert early == [True] * 15 + [False] * 35
    mirrored = [is_prune_less(i / 50, "prune-more-early") for i in range(50)]
    assert mirrored == [False] * 15 + [True] * 35
    assert not any(is_prune_less(i / 50, "constant") for i in range(50))
    assert [prune_less_steps(50, schedule) for schedule in SCHEDULES] == [15, 35, 0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps=st.integers(1, 1000), percent=st.integers(0, 100))
def test_steps_are_counted_exactly(steps: int, percent: int) -> None:
    # Step i is early while i / steps < percent / 100, counted in fractions.
    exact = sum(Fraction(i, steps) < Fraction(percent, 100) for i in range(steps))
    share = percent / 100
    assert prune_less_steps(steps, "prune-less-early", share) == exact
    assert prune_less_steps(steps, "prune-more-early", share) == steps - exact
    assert prune_less_steps(steps, "constant", share) == 0


@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100, 250, 1000])
@pytest.mark.parametrize(
    ("tenths", "threshold"),
    # 0.1 * 3 is 0.30000000000000004, and 0.7 in float32 is 0.69999999.
    [(3, 0.1 * 3), (3, 3 / 10), (3, 15 / 50), (3, 1 - 0.7), (7, 0.7), (7, 0.1 * 7)],
)
def test_rounding_does_not_move_the_change_over(steps: int, tenths: int, threshold: float) -> None:
    first_normal = steps * tenths // 10
    for share in (first_normal / steps, 1 - (steps - first_normal) / steps, torch.tensor(first_normal / steps).item()):
        assert not is_prune_less(share, prune_less_share=threshold)
    assert is_prune_less((first_normal - 1) / steps, prune_less_share=threshold)


def test_the_whole_run_or_none_of_it() -> None:
    assert prune_less_steps(7, prune_less_share=0.0) == 0
    assert prune_less_steps(7, prune_less_share=1.0) == 7
    assert prune_less_steps(1) == 1  # a single step is the first


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: is_prune_less(0.1, "early"), "prune-less-early"),
        (lambda: is_prune_less(1.0), "share"),
        (lambda: is_prune_less(-0.1), "share"),
        (lambda: is_prune_less(0.1, prune_less_share=1.1), "prune_less_share"),
        (lambda: is_prune_less(0.1, prune_less_share=-0.1), "prune_less_share"),
        (lambda: prune_less_steps(0), "steps"),
    ],
)
def test_arguments_out_of_range_are_refused(call: object, word: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=word):
        call()
