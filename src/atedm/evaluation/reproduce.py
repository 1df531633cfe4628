"""Run one of the paper's experiments: every method under every setting, on images that experiments share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from atedm.costs.budget import CostOutOfReach
from atedm.evaluation.evaluate import Progress, Result, evaluate
from atedm.evaluation.experiments import Experiment
from atedm.evaluation.images import Drawing
from atedm.evaluation.methods import Method
from atedm.evaluation.methods_by_name import method_by_name
from atedm.evaluation.prompts import Prompt
from atedm.evaluation.report import image_sheet, settings_sheet, table
from atedm.evaluation.scores import Metrics


@dataclass(frozen=True)
class Outcome:
    """Results of an experiment under one setting."""

    drawing: Drawing
    results: tuple[Result, ...]
    #: Methods that cannot be had under this setting, and why.
    left_out: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        dense = next((result for result in self.results if result.name == "dense"), None)
        results = [result.as_dict(dense) for result in self.results]
        return {"drawing": asdict(self.drawing), "results": results, "left_out": dict(self.left_out)}


def reproduce(
    experiment: Experiment,
    pipe: Any,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    metrics: Metrics,
    out: Path,
    *,
    state: PartialState | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run an experiment. Images are kept by setting and method, so that experiments share them and runs resume.

    Args:
        experiment: One of `atedm.evaluation.experiments.EXPERIMENTS`.
        pipe: A text-to-image pipeline, as it is.
        prompts: What to draw.
        drawing: What is the same for every method, but for what the experiment varies.
        metrics: Which figures, by which models.
        out: Where everything is kept.
        state: Of `accelerate`, where several processes share the work.
        progress: Told of every group of images and every metric.

    Returns:
        One outcome a setting; empty results in all processes but the first.

    Raises:
        ValueError: As `evaluate`, or if every cost is out of reach on this model.
    """
    outcomes = []
    for setting in settings(experiment, drawing):
        specs = experiment.methods
        methods: dict[str, Method] = {}
        left_out: dict[str, str] = {}
        for label, spec in specs.items():
            try:
                methods[label] = method_by_name(spec, setting.model, size=setting.size, steps=setting.steps)
            except CostOutOfReach as error:
                left_out[label] = str(error)
        if not methods:
            raise ValueError(next(iter(left_out.values())))
        folder = out / folder_name(setting)
        by_spec = {specs[label]: method for label, method in methods.items()}
        found = evaluate(pipe, by_spec, prompts, setting, metrics, folder, state=state, progress=progress)
        labels = {spec: label for label, spec in specs.items()}
        named = tuple(replace(result, name=labels.get(result.name, result.name)) for result in found)
        outcomes.append(Outcome(setting, named, left_out))
    return outcomes


def folder_name(setting: Drawing) -> str:
    """Name of the folder that holds the images of a setting."""
    size = f"-{setting.width}x{setting.height}" if setting.size else ""
    return f"{setting.steps}-steps-guidance-{setting.guidance:g}{size}-{setting.dtype}"


def settings(experiment: Experiment, drawing: Drawing) -> list[Drawing]:
    """Return the settings that an experiment runs under."""
    return [
        replace(drawing, steps=steps, guidance=guidance)
        for steps in experiment.steps or (drawing.steps,)
        for guidance in experiment.guidance or (drawing.guidance,)
    ]


def markdown_of(experiment: Experiment, outcomes: Sequence[Outcome]) -> str:
    """Show every outcome as one Markdown table, with the setting in front where there are several."""
    lines: list[str] = []
    for outcome in outcomes:
        head, rows = table(outcome.results)
        setting = _setting(experiment, outcome.drawing)
        head, rows = [*setting, *head], [[*map(str, setting.values()), *row] for row in rows]
        if not lines:
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    reasons = {f"{label}: {reason}" for outcome in outcomes for label, reason in outcome.left_out.items()}
    return "\n".join([*lines, *([""] if reasons else []), *(f"- {reason}" for reason in sorted(reasons))])


def sheet_of(experiment: Experiment, outcomes: Sequence[Outcome], prompts: Sequence[Prompt]) -> Image.Image:
    """Lay out the first images of every method, a prompt a row; under several settings, settings below each other."""
    if len(outcomes) == 1:
        return image_sheet(outcomes[0].results, prompts)
    named = {
        ", ".join(f"{what} {value:g}" for what, value in _setting(experiment, outcome.drawing).items()): outcome.results
        for outcome in outcomes
    }
    return settings_sheet(named, prompts)


def _setting(experiment: Experiment, drawing: Drawing) -> Mapping[str, float]:
    shown: dict[str, float] = {}
    if experiment.steps:
        shown["steps"] = drawing.steps
    if experiment.guidance:
        shown["guidance"] = drawing.guidance
    return shown
