"""Activation memory of a U-Net call as a real device has it, to hold against what is traced without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from atedm.costs.architectures import run_once
from atedm.costs.memory_traced import Footprint

_CALL = "atedm: one call of the U-Net"


class Held(NamedTuple):
    """Bytes held over a span of time."""

    peak: int
    #: Bytes times nanoseconds.
    area: int
    nanoseconds: int


def measured_footprint(
    unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int, *, repeats: int = 3
) -> Footprint:
    """Measure the activations of one call of ``unet``, by the allocations that torch's profiler sees.

    Memory that the allocator has back counts as free, as supplement D assumes. The calls are preceded by one that is
    not counted. On CUDA each operation is waited for, because the host allocates long before the device computes; the
    time is therefore not that of a call left alone.

    Args:
        unet: On the CPU or on CUDA, patched or not.
        call: What the call takes besides the timestep, on the same device.
        timestep: A number, by which a patched U-Net tells where in the run it is.
        repeats: Calls to measure.

    Returns:
        A `Footprint`, of what the call adds: the highest peak of the calls, and their mean average and duration.

    Raises:
        ValueError: If the device is another one, or ``repeats`` below 1.
    """
    device = unet.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"memory can be measured on the CPU and on CUDA, not on {device}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    with torch.no_grad():
        run_once(unet, call, timestep)
        measured = [_measure(lambda: run_once(unet, call, timestep), device) for _ in range(repeats)]
    nanoseconds = sum(held.nanoseconds for held in measured)
    return Footprint(
        peak=max(held.peak for held in measured),
        average=sum(held.area for held in measured) / nanoseconds,
        seconds=nanoseconds / repeats / 1e9,
        basis=f"measured on {device.type}",
    )


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that a call holds beyond what was held before; None where the device does not say."""
    if device.type == "cpu":
        return _measure(call, device).peak
    if device.type != "cuda":
        return None
    before = _reset(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _measure(call: Callable[[], object], device: torch.device) -> Held:
    """One call."""
    if device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function(_CALL):
            call()
        return held_over_time(*_events(profiler, "CPU"))
    before = _reset(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, profile_memory=True) as profiler, record_function(_CALL), _WaitForEach(device):
        call()
    held = held_over_time(*_events(profiler, "CUDA"))
    return held._replace(peak=torch.cuda.max_memory_allocated(device) - before)


def _reset(device: torch.device) -> int:
    """Forget the peak so far, and return the bytes that are held now."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


class _WaitForEach(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Let no operation begin before the last one has ended, so that the host's clock tells when memory is in use."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.cuda.synchronize(self._device)
        return out


def _events(profiler: profile, device: str) -> tuple[list[tuple[int, int]], int, int]:
    """(when, bytes more or less) of every allocation, and when the call began and ended, all in nanoseconds."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = results.events()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type().name == device
    ]
    # On CUDA the span is there twice, once as the device saw it.
    span = next(event for event in events if event.name() == _CALL and event.device_type().name == "CPU")
    return changes, span.start_ns(), span.start_ns() + span.duration_ns()


def held_over_time(changes: Iterable[tuple[int, int]], start: int, end: int) -> Held:
    """Add up what is held between ``start`` and ``end``, beyond what was held at the start.

    Args:
        changes: (when, bytes): positive where memory is taken, negative where it is given back.
        start: When to begin, in the unit of the changes.
        end: When to stop.
    """
    held = peak = area = 0
    last = start
    # By time alone: of changes in one instant the order they are given in counts, or a peak would be lost.
    for when, size in sorted((change for change in changes if start <= change[0] < end), key=itemgetter(0)):
        area += held * (when - last)
        last = when
        held += size
        peak = max(peak, held)
    return Held(peak, area + held * (end - last), end - start)
