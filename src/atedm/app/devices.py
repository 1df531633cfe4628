"""Where a model runs, and in which precision."""

import platform
from pathlib import Path

import diffusers
import torch


def best_device() -> str:
    """Return "cuda", "mps" or "cpu", whichever is the fastest here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usual_dtype(device: str | torch.device) -> torch.dtype:
    """Return float32 for the CPU and float16 for other devices."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def check_device(name: str) -> None:
    """Check that torch knows a device and that this machine has it.

    Raises a `ValueError` if not; the message says what is there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; give cuda, mps or cpu") from error
    is_there = True
    if device.type == "cuda":
        is_there = (device.index or 0) < torch.cuda.device_count()
    elif device.type == "mps":
        is_there = torch.backends.mps.is_available()
    elif device.type != "cpu":
        backend = getattr(torch, device.type, None)  # such as torch.xpu; there is none for "meta"
        is_there = backend is not None and backend.is_available()
    if not is_there:
        raise ValueError(f"there is no device {name!r} here; the fastest there is, {best_device()!r}, is the default")


def processor_of(device: str) -> str:
    """Return the name of the GPU, or of the CPU as far as the system tells; ``device`` as torch names it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
