"""``run.json``: everything needed to make the images of a run again, written beside them and read back."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch

import atedm
from atedm.app.request import ImageResult, Request
from atedm.files import read_json
from atedm.hosts.models import find_model
from atedm.method.contract import Method
from atedm.method.presets import method_from_dict
from atedm.plans.plan import plan_from_dict

NAME = "run.json"
MASK = "protect.png"
"""The mask of a run, in the same folder."""


def run_file(pipe: Any, request: Request, model: str, cost: float, images: Sequence[ImageResult]) -> dict[str, Any]:
    """Return the content of ``run.json`` for the images made so far, as plain JSON values."""
    return {
        "atedm": atedm.__version__,
        "model": model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "request": {
            **{field.name: getattr(request, field.name) for field in dataclasses.fields(request)},
            "method": request.method.as_dict(),
            "other": None if request.other is None else request.other.as_dict(),
            "plan": None if request.plan is None else request.plan.moved().as_dict(),
        },
        "cost": round(cost, 4),
        "dtype": str(find_model(pipe).dtype).removeprefix("torch."),
        "device": str(find_model(pipe).device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "images": [asdict(image) for image in images],
    }


def read_run_file(file: Path) -> tuple[str, Request]:
    """Return the name of the model of a run, and what was made with it.

    Nothing is imported or opened that the file names.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is no run file, or not enough to make the run again; the message says why.
    """
    run = read_json(file, advice="give the run.json of a run")
    model, values = run.get("model"), run.get("request")
    if not isinstance(model, str) or not isinstance(values, dict):
        raise ValueError(f"{file} is no run file: it names no model and request")
    known = {field.name for field in dataclasses.fields(Request)}
    try:
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"Request has no field {unknown[0]!r}; it may be from another version of atedm")
        if not isinstance(prompts := values.get("prompts"), list):
            raise ValueError(f"prompts must be a list, not {prompts!r}")
        methods: dict[str, Any] = {"method": _read_method(values.get("method"))}
        if values.get("other") is not None:
            methods["other"] = _read_method(values["other"])
        if values.get("plan") is not None:
            methods["plan"] = plan_from_dict(values["plan"])
        request = Request(**values | {"prompts": tuple(prompts)} | methods)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no run that can be made again: {error}") from error
    if request.protect and (mask := file.parent / MASK).exists():
        request = dataclasses.replace(request, protect=str(mask))  # the picture itself may be elsewhere by now
    return model, request


def _read_method(values: object) -> Method:
    if not isinstance(values, dict):
        raise ValueError(f"a method must be fields by name, not {values!r}")
    return method_from_dict(values)
