"""The folder of a run: its images, and ``run.json`` with everything needed to make them again, which is read back."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import atedm
from atedm.app.devices import versions
from atedm.app.request import ImageResult, Request
from atedm.files import read_json, save_image, save_json
from atedm.hosts.models import find_model
from atedm.method.contract import Method
from atedm.method.presets import method_from_dict
from atedm.plans.plan import plan_from_dict

NAME = "run.json"
MASK = "protect.png"
"""The mask of a run, in the same folder."""
_NAMES = re.compile(r"(pruned|dense|other|maps)-\d+\.png|comparison\.png")
"""Pictures of a run. Nobody else is likely to use these names."""


def run_file(pipe: Any, request: Request, model: str, cost: float, images: Sequence[ImageResult]) -> dict[str, Any]:
    """Return the content of ``run.json`` for the images made so far, as plain JSON values."""
    return {
        "atedm": atedm.__version__,
        "model": model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "request": {
            **vars(request),
            "method": request.method.as_dict(),
            "other": None if request.other is None else request.other.as_dict(),
            "plan": None if request.plan is None else request.plan.moved().as_dict(),
        },
        "cost": round(cost, 4),
        "dtype": str(find_model(pipe).dtype).removeprefix("torch."),
        "device": str(find_model(pipe).device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "images": [asdict(image) for image in images],
    }


def read_run_file(file: Path) -> tuple[str, Request]:
    """Return the name of the model of a run, and what was made with it.

    Nothing is imported or opened that the file names. Raises a `FileNotFoundError` if the file does not exist, and a
    `ValueError` if it is no run file, or not enough to make the run again; the message says why.
    """
    run = read_json(file, advice="give the run.json of a run")
    model, values = run.get("model"), run.get("request")
    if not isinstance(model, str) or not isinstance(values, dict):
        raise ValueError(f"{file} is no run file: it names no model and request")
    known = {field.name for field in fields(Request)}
    try:
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"Request has no field {unknown[0]!r}; it may be from another version of atedm")
        if not isinstance(prompts := values.get("prompts"), list):
            raise ValueError(f"prompts must be a list, not {prompts!r}")
        read: dict[str, Any] = {"prompts": tuple(prompts), "method": _read_method(values.get("method"))}
        if values.get("other") is not None:
            read["other"] = _read_method(values["other"])
        if values.get("plan") is not None:
            read["plan"] = plan_from_dict(values["plan"])
        request = Request(**values | read)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no run that can be made again: {error}") from error
    if request.protect and (mask := file.parent / MASK).exists():
        request = replace(request, protect=str(mask))  # the picture itself may be elsewhere by now
    return model, request


def _read_method(values: object) -> Method:
    if not isinstance(values, dict):
        raise ValueError(f"a method must be fields by name, not {values!r}")
    return method_from_dict(values)


class OutputFolder:
    """Writes what a run makes. Until there is an image, an earlier run in the same folder stays whole."""

    def __init__(self, path: Path, content: Callable[[], dict[str, Any]], mask: Image.Image | None = None) -> None:
        """Make the folder if missing; ``content`` gives what ``run.json`` says at the moment."""
        self.path, self.content, self.mask = path, content, mask
        self.is_empty = True
        path.mkdir(parents=True, exist_ok=True)

    def save(self, image: Image.Image, name: str) -> None:
        """Write an image."""
        if self.is_empty:
            self._remove_earlier_run()
            self.save_run_file()
            if self.mask is not None:
                save_image(self.mask, self.path / MASK)
            self.is_empty = False
        save_image(image, self.path / name)

    def save_run_file(self) -> None:
        """Write ``run.json`` as it is now."""
        save_json(self.content(), self.path / NAME)

    def _remove_earlier_run(self) -> None:
        if not (self.path / NAME).exists():
            return  # these are no images of ours
        for file in self.path.iterdir():
            if file.name == MASK or _NAMES.fullmatch(file.name):
                file.unlink()
