"""Means and shares with 95 % intervals: the bootstrap of scipy over captions."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from atedm.lab.extra import optional


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """Show as "97.5 (96.0 to 98.6)"."""
        return f"{scale * self.mean:.{digits}f} ({scale * self.low:.{digits}f} to {scale * self.high:.{digits}f})"


def ratio_interval(right: ArrayLike, asked: ArrayLike, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Estimate sum(right) / sum(asked) of (n,) captions, of which whole ones are resampled ``draws`` times.

    Objects of one caption depend on each other, so they are not resampled one by one. Raises an `ImportError` if scipy
    is not installed, and a `ValueError` if nothing is asked at all.
    """
    r, a = np.asarray(right, dtype=np.float64), np.asarray(asked, dtype=np.float64)
    if a.sum() <= 0:
        raise ValueError("no caption asks for this, so there is no share to give")

    def share(r: Any, a: Any, axis: int = -1) -> Any:
        with np.errstate(invalid="ignore"):  # a sample may hold no caption that asks
            return r.sum(axis=axis) / a.sum(axis=axis)

    mean = float(share(r, a))
    if len(r) == 1:
        return Interval(mean, mean, mean)
    options = {"paired": True, "vectorized": True, "batch": 200, "method": "percentile"}
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples in which nothing is asked: they are left out below
        found = optional("scipy.stats").bootstrap((r, a), share, n_resamples=draws, random_state=rng, **options)
    low, high = np.nanpercentile(found.bootstrap_distribution, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def mean_interval(values: ArrayLike, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Estimate the mean of ``values`` (n,), as `ratio_interval`; raises a `ValueError` if there are none."""
    if not np.size(values):
        raise ValueError("no values to average")
    return ratio_interval(values, np.ones(np.shape(values)), draws=draws, seed=seed)
