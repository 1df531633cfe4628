"""The most bytes that a call holds, as the device at hand says."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that a call holds beyond what was held before; None where the device does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):  # of one instant in the order they are given
        held += size
        peak = max(peak, held)
    return peak
