"""What a time was measured on: the processor, and the releases of the packages."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def processor_of(device: str) -> str:
    """Return the name of the GPU, or of the CPU as far as the system tells.

    Args:
        device: As torch names it, such as "cpu" or "cuda:0".
    """
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of Python and some packages; "none" of one that is not installed."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    return {"python": platform.python_version()} | {package: of(package) for package in packages}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
