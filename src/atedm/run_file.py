"""The run file: everything needed to draw a run again, written beside the images as ``run.json`` and read back."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

import atedm
from atedm.config import PruningConfig
from atedm.files import read_json
from atedm.request import Made, Request

if TYPE_CHECKING:
    from atedm.patching.summary import PatchSummary

NAME = "run.json"
PROTECT = "protect.png"
"""The mask of a run, beside it."""


def run_file(pipe: Any, request: Request, model: str, summary: PatchSummary, made: Sequence[Made]) -> dict[str, Any]:
    """Return what ``run.json`` says of a run, as plain JSON values."""
    return {
        "atedm": atedm.__version__,
        "model": model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "request": {
            **asdict(request),
            "config": request.config.as_dict(),
            "beside": None if request.beside is None else request.beside.as_dict(),
        },
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": str(pipe.unet.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "attention_block_saving": {
            "normal_step": round(summary.saving, 4),
            "mean_of_50_steps": round(summary.mean_saving, 4),
        },
        "images": [asdict(image) for image in made],
    }


def read_run_file(file: Path) -> tuple[str, Request]:
    """Return the name of the model of a run, and what was made with it.

    Nothing is imported or opened that the file names.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no run file, or of a run that cannot be had from it alone; the message says why.
    """
    run = read_json(file, advice="give the run.json of a run")
    model, asked = run.get("model"), run.get("request")
    if not isinstance(model, str) or not isinstance(asked, dict):
        raise ValueError(f"{file} is no run file: it names no model and request, as the run.json of a run does")
    try:
        fields = _known(asked, Request)
        if not isinstance(prompts := fields.get("prompts"), list):
            raise ValueError(f"prompts must be a list, not {prompts!r}")
        config, beside = (_config(fields.pop(name, None)) for name in ("config", "beside"))
        if config is None:
            raise ValueError("it has no pruning config")
        if fields.get("protect") and (kept := file.parent / PROTECT).exists():
            fields["protect"] = str(kept)  # the picture itself may be named from another folder, or be gone
        return model, Request(**fields | {"prompts": tuple(prompts), "config": config, "beside": beside})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no run that can be drawn: {error}") from error


def _config(values: object) -> PruningConfig | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"a pruning config must be fields by name, not {values!r}")
    return PruningConfig(**_known(values, PruningConfig))


def _known(values: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    if strange := [name for name in values if name not in known]:
        raise ValueError(f"{kind.__name__} has no field {strange[0]!r}; it may be from another version of atedm")
    return dict(values)
