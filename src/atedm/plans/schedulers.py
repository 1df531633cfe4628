"""Schedulers that a plan may take in place of the model's own: those that are good at few steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SCHEDULERS = {"dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
"""Classes of diffusers by name."""


@contextmanager
def scheduled(pipe: Any, name: str | None) -> Iterator[None]:
    """Give a pipeline another scheduler, set up as its own is, for the length of a ``with`` block; None gives none."""
    if name is None:
        yield
        return
    import diffusers

    own = pipe.scheduler
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own
