"""Means with an honest interval: the bootstrap over captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """Show as "97.5 (96.0 to 98.6)"."""
        return f"{scale * self.mean:.{digits}f} ({scale * self.low:.{digits}f} to {scale * self.high:.{digits}f})"


def ratio_interval(right: ArrayLike, asked: ArrayLike, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Interval of sum(right) / sum(asked) when whole captions are drawn again with replacement.

    Objects of one caption stand or fall together, so captions are what is resampled.

    Args:
        right: (n,) how much of each caption is right.
        asked: (n,) how much it asks for.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        ValueError: If nothing is asked at all.
    """
    r, a = np.asarray(right, dtype=np.float64), np.asarray(asked, dtype=np.float64)
    if a.sum() <= 0:
        raise ValueError("no caption asks for this, so there is no share to give")
    rows = _resample(len(r), draws, seed)
    totals = a[rows].sum(axis=1)
    shares = r[rows].sum(axis=1)[totals > 0] / totals[totals > 0]
    return Interval(float(r.sum() / a.sum()), *_ends(shares))


def mean_interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean of ``values`` (n,)."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values to average")
    return Interval(float(x.mean()), *_ends(x[_resample(len(x), draws, seed)].mean(axis=1)))


def _resample(n: int, draws: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def _ends(samples: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
