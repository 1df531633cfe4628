"""Time on any device: laps, and their spread over repeats."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch


class Stopwatch:
    """Starts when it is made; `lap` adds the time since the last lap to a name.

    On CUDA laps are events in the stream, and nothing waits before `read`: a lap that waited would charge each part for
    starting the device anew.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # do not count what is still running
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """Add the time since the last lap to ``name``."""
        self._marks.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each name."""
        total: defaultdict[str, float] = defaultdict(float)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for (_, start), (name, end) in pairwise(self._marks):
            total[name] += start.elapsed_time(end) if self._device.type == "cuda" else end - start
        return dict(total)

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type == "mps":
            torch.mps.synchronize()
        return 1e3 * time.perf_counter()


class Spread(NamedTuple):
    """Median and range of several repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 1) -> str:
        """Show as "1.5 (1.2 to 1.9)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"
