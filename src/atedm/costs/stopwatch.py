"""Laps on any device, and how much memory it has free."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Runs from its making; `lap` adds the time since the last lap to a name.

    On CUDA laps are events in the stream, and nobody waits for the device before `read`: a lap that waited would
    charge each part for starting the device anew, which no part does when they run one after another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what is still running is not ours
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


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device; where the system does not say, those of the whole of it, or infinity."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # it counts what caches would give back, and sysconf does not
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    names = getattr(os, "sysconf_names", {})
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    return float("inf") if pages is None else float(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"))
