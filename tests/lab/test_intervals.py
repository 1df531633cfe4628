"""Intervals: right on average, against closed forms and their own definition."""

from __future__ import annotations

import numpy as np
import pytest

from atedm.lab.scores.intervals import Interval, mean_interval, ratio_interval


def test_the_interval_of_a_share_matches_the_normal_approximation() -> None:
    right = np.r_[np.ones(300), np.zeros(100)]
    interval = ratio_interval(right, np.ones(400), draws=20_000)
    assert interval.mean == 0.75
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.low == pytest.approx(0.75 - half, abs=0.005)
    assert interval.high == pytest.approx(0.75 + half, abs=0.005)


def test_objects_of_one_caption_stand_or_fall_together() -> None:
    clustered = ratio_interval(np.r_[np.full(50, 2), np.zeros(50)], np.full(100, 2), draws=5000)
    independent = ratio_interval(np.r_[np.ones(100), np.zeros(100)], np.ones(200), draws=5000)
    assert clustered.high - clustered.low > 1.3 * (independent.high - independent.low)


def test_captions_that_do_not_ask_do_not_count() -> None:
    interval = ratio_interval([1, 0, 0], [1, 0, 1])
    assert interval.mean == 0.5
    with pytest.raises(ValueError, match="no caption asks"):
        ratio_interval([0, 0], [0, 0])


def test_the_interval_of_a_mean_covers_it_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        interval = mean_interval(list(rng.normal(3, 2, size=60)), draws=400, seed=trial)
        inside += interval.low <= 3 <= interval.high
    assert 0.90 <= inside / 300 <= 0.985


def test_equal_seeds_give_equal_intervals() -> None:
    values = list(np.random.default_rng(1).normal(size=30))
    assert mean_interval(values) == mean_interval(values)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_text() -> None:
    assert Interval(0.5, 0.25, 0.75).text(100) == "50.0 (25.0 to 75.0)"
