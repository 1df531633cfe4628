"""``plan.json``: the steps, the scheduler, the method and the cache that suit one model, and how they were found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atedm.files import read_json, save_json
from atedm.method.contract import Method
from atedm.method.presets import method_from_dict
from atedm.plans.schedulers import SCHEDULERS
from atedm.words import check_name, check_whole, is_number

FORMAT = 1
"""Of the file. It grows when an older atedm could not read a file rightly."""


@dataclass(frozen=True)
class Cache:
    """Only some steps run the whole model. The others take its deep features from the last of those (DeepCache), or
    its output from the line through the last two (a forecast, which costs nothing).

    Raises:
        ValueError: If a value is out of its range.
    """  # noqa: D205

    #: Steps that run the whole model, of the steps of the plan.
    full: int
    #: Where they lie: at 1 evenly, above 1 closer together at the start of the run, below 1 at its end.
    bend: float = 1.0
    #: Which skip connection is the last to be computed in the other steps, counted from the shallowest; None is a
    #: forecast.
    branch: int | None = 0

    def __post_init__(self) -> None:
        """Check every value."""
        check_whole("full", self.full)
        if self.branch is not None:
            check_whole("branch", self.branch, least=0)
        if not is_number(self.bend) or not 0.25 <= self.bend <= 4:
            raise ValueError(f"bend must be from 0.25 to 4, not {self.bend!r}")


def full_steps(steps: int, full: int, bend: float = 1.0) -> tuple[int, ...]:
    """Return which of ``steps`` steps run the whole model: ``full`` of them, ascending, the first one always.

    >>> full_steps(10, 5), full_steps(10, 5, 2.0)
    ((0, 2, 4, 6, 8), (0, 1, 2, 4, 6))
    """
    full = min(full, steps)
    found: list[int] = []
    for index in range(full):
        wanted = round(steps * (index / full) ** bend)
        least = found[-1] + 1 if found else 0
        found.append(min(max(wanted, least), steps - (full - index)))
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """What to do with one model. `atedm.apply` takes it, and so does every command that takes ``--plan``.

    Raises:
        ValueError: If a value is out of its range.
    """

    #: What the model must be like: see `atedm.plans.fingerprint.fingerprint`.
    model: Mapping[str, Any]
    #: Denoising steps, which the caller hands to the pipeline.
    steps: int
    #: Name of a scheduler, one of `SCHEDULERS`; None is the model's own.
    scheduler: str | None = None
    #: What prunes; None prunes nothing.
    method: Method | None = None
    #: None runs the whole model in every step.
    cache: Cache | None = None
    #: Guidance scale that it was found with; None leaves it open.
    guidance: float | None = None
    #: (width, height) in pixels that it was found at; None is the model's own.
    size: tuple[int, int] | None = None
    #: A LoRA that `atedm finetune` trained for this plan: a folder, seen from the plan's own.
    lora: str | None = None
    #: A refill that `atedm fit` fitted to this plan: a file, seen from the plan's own folder.
    fit: str | None = None
    #: How it was found: budget, measured cost and time, distances, prompts, machine, versions. Plain JSON values.
    found: Mapping[str, Any] = field(default_factory=dict)
    #: Folder of the file it was read from.
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("model", "found"):
            _fields(name, getattr(self, name))
        check_whole("steps", self.steps)
        if self.scheduler is not None:
            check_name("scheduler", self.scheduler, SCHEDULERS)
        if self.cache is not None and self.cache.full > self.steps:
            raise ValueError(f"full must be at most the {self.steps} steps of the plan, not {self.cache.full}")
        if self.guidance is not None and (not is_number(self.guidance) or not 0 <= self.guidance < 1000):
            raise ValueError(f"guidance must be 0 or more and below 1000, not {self.guidance!r}")
        if self.size is not None:
            if len(self.size) != 2:
                raise ValueError(f"size must be (width, height) in pixels, not {self.size!r}")
            for name, side in zip(("width", "height"), self.size, strict=True):
                check_whole(name, side, least=8)
        for name in ("dense_steps", "weights"):
            if name in self.found:
                check_whole(f"{name} of found", self.found[name], least=name == "dense_steps")
        for name in ("cost", "distance"):
            if name in self.found and not is_number(self.found[name]):
                raise ValueError(f"{name} of found must be a number, not {self.found[name]!r}")
        for name, what in (("lora", "folder"), ("fit", "file")):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be the name of a {what}, not {value!r}")
        if self.lora is not None and self.fit is not None:
            raise ValueError("a plan has a LoRA or a fit, not both: each is found for the weights without the other")

    def full_steps(self, steps: int | None = None) -> tuple[int, ...]:
        """Return which of ``steps`` steps, the plan's own by default, run the whole model."""
        steps = self.steps if steps is None else steps
        if self.cache is None:
            return tuple(range(steps))
        full = self.cache.full if steps == self.steps else max(1, round(self.cache.full * steps / self.steps))
        return full_steps(steps, full, self.cache.bend)

    @property
    def lora_folder(self) -> Path | None:
        """Where its LoRA is."""
        return None if self.lora is None else (self.folder or Path()) / self.lora

    @property
    def fit_file(self) -> Path | None:
        """Where its fitted refill is."""
        return None if self.fit is None else (self.folder or Path()) / self.fit

    def moved(self) -> Plan:
        """Return the plan with whole paths of its LoRA and its fit, so that it can be written to another folder."""
        lora, fit = (None if path is None else str(path.resolve()) for path in (self.lora_folder, self.fit_file))
        return dataclasses.replace(self, lora=lora, fit=fit)

    def what(self) -> str:
        """Say in a few words what it does."""
        parts = [f"{self.steps} step{'s' * (self.steps != 1)}"]
        if self.scheduler is not None:
            parts.append(f"scheduler {self.scheduler}")
        if self.cache is not None:
            others = "forecast" if self.cache.branch is None else "by DeepCache"
            parts.append(f"{self.cache.full} of them whole, the others {others}")
        if self.method is not None:
            parts.append(f"{self.method.name} at a rate of {self.method.rate:.3g}")
        if self.fit is not None:
            parts.append("a fitted refill")
        if self.lora is not None:
            parts.append("a LoRA")
        return ", ".join(parts)

    def settings(self) -> dict[str, Any]:
        """Return what it does as plain JSON values, without how it was found."""
        return {
            "steps": self.steps,
            "scheduler": self.scheduler,
            "method": None if self.method is None else self.method.as_dict(),
            "cache": None if self.cache is None else dataclasses.asdict(self.cache),
            "guidance": self.guidance,
            "size": None if self.size is None else list(self.size),
            "lora": self.lora,
            "fit": self.fit,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return {"plan": FORMAT, "model": dict(self.model), **self.settings(), "found": dict(self.found)}


def save_plan(plan: Plan, file: Path) -> None:
    """Write a plan, whole or not at all."""
    save_json(plan.as_dict(), file)


def read_plan(file: Path | str) -> Plan:
    """Read a plan. Nothing is imported or opened that the file names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no plan, a field is unknown or missing, or a value is wrong; the message names it.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no plan at {str(file)!r}; `atedm tune` writes one")
    values = read_json(file, advice="give the plan.json that `atedm tune` wrote")
    try:
        return dataclasses.replace(plan_from_dict(values), folder=file.parent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no plan that can be used: {error}") from error


def plan_from_dict(content: object) -> Plan:
    """Read back what `Plan.as_dict` gave. Nothing is imported that it names.

    Raises:
        TypeError: If a value is of another kind than it should be.
        ValueError: If a field is unknown or missing, or a value is wrong.
    """
    values = _fields("a plan", content)
    if values.pop("plan", None) != FORMAT:
        raise ValueError(f'"plan" must be {FORMAT}, the format that this atedm reads')
    known = {one.name for one in dataclasses.fields(Plan)} - {"folder"}
    for name in values:
        check_name("field", name, known)
    if missing := [name for name in ("model", "steps") if name not in values]:
        raise ValueError(f"it has no {missing[0]!r}")
    if values.get("method") is not None:
        values["method"] = method_from_dict(_fields("method", values["method"]))
    if values.get("cache") is not None:
        cache = _fields("cache", values["cache"])
        for name in cache:
            check_name("field of cache", name, [one.name for one in dataclasses.fields(Cache)])
        values["cache"] = Cache(**cache)
    if values.get("size") is not None:
        if not isinstance(values["size"], list):
            raise ValueError(f"size must be [width, height] in pixels, not {values['size']!r}")
        values["size"] = tuple(values["size"])
    return Plan(**values)


def _fields(what: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be fields by name, not {value!r}")
    return dict(value)


def refuse_difference(name: str, planned: object, here: object) -> None:
    """Raise a `ValueError` if a plan is for a model whose ``name`` is another."""
    if planned != here:
        raise ValueError(
            f"this plan is for another model: its {name} is {planned!r}, here it is {here!r}; find one for this model "
            "by `atedm tune`"
        )
