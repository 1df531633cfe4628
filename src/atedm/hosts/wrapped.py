"""Look through what is wrapped around a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: Any) -> Any:
    """Return the model inside of wrappers of `torch.compile` and `DistributedDataParallel`, or ``model`` itself."""
    while isinstance(wrapped := getattr(model, "_orig_mod", None) or _inside(model), nn.Module):
        model = wrapped
    return model


def _inside(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else None
