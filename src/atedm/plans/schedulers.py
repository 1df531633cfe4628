"""Schedulers that a plan may take in place of the model's own: those that are good at few steps."""

from __future__ import annotations

from typing import Any

SCHEDULERS = {"dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
"""Classes of diffusers by name."""


def scheduler_named(name: str, pipe: Any) -> Any:
    """Return a scheduler for the noise schedule of a pipeline, set up as its own is."""
    import diffusers

    return getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)
