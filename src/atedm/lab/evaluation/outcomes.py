"""Run an experiment: every method under every setting, on images that experiments share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from atedm.costs.budget import CostOutOfReach
from atedm.lab.evaluation.experiments import Experiment
from atedm.lab.evaluation.images import Drawing
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.evaluation.run import Result, evaluate
from atedm.lab.evaluation.scoring import Metrics
from atedm.lab.methods.by_name import method_by_name
from atedm.lab.methods.candidates import Candidate
from atedm.lab.progress import Progress, silent


@dataclass(frozen=True)
class Outcome:
    """Results of an experiment under one setting."""

    drawing: Drawing
    results: tuple[Result, ...]
    #: What the experiment varies, by name, such as {"guidance": 7.0}.
    setting: Mapping[str, float] = field(default_factory=dict)
    #: Methods that cannot be had under this setting, and why.
    left_out: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        dense = next((result for result in self.results if result.name == "dense"), None)
        results = [result.as_dict(dense) for result in self.results]
        return {"drawing": asdict(self.drawing), "results": results, "left_out": dict(self.left_out)}


def run_experiment(
    experiment: Experiment,
    pipe: Any,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    metrics: Metrics,
    out: Path,
    *,
    state: PartialState | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Run an experiment, as `evaluate` under each of its settings.

    Images are kept by setting and method, so that experiments share them and runs resume.

    Returns:
        One outcome a setting; their results are empty in all processes but the first.

    Raises:
        ImportError: As `evaluate`.
        ValueError: As `evaluate`, or if every cost is out of reach on this model.
    """
    outcomes = []
    labels = {spec: label for label, spec in experiment.methods.items()}
    for steps in experiment.steps or (drawing.steps,):
        for guidance in experiment.guidance or (drawing.guidance,):
            here = replace(drawing, steps=steps, guidance=guidance)
            methods, left_out = _methods(experiment, here)
            folder = out / setting_name(here)
            found = evaluate(pipe, methods, prompts, here, metrics, folder, state=state, progress=progress)
            named = tuple(replace(result, name=labels.get(result.name, result.name)) for result in found)
            setting: dict[str, float] = {"steps": steps} if experiment.steps else {}
            setting |= {"guidance": guidance} if experiment.guidance else {}
            outcomes.append(Outcome(here, named, setting, left_out))
    return outcomes


def _methods(experiment: Experiment, drawing: Drawing) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the methods by what describes them, and by label why others cannot be had."""
    methods: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    for label, spec in experiment.methods.items():
        try:
            methods[spec] = method_by_name(spec, drawing.model, size=drawing.size, steps=drawing.steps)
        except CostOutOfReach as error:
            left_out[label] = str(error)
    if not methods:
        raise ValueError(next(iter(left_out.values())))
    return methods, left_out


def setting_name(drawing: Drawing) -> str:
    """Name of the folder that holds the images of a setting."""
    size = f"-{drawing.width}x{drawing.height}" if drawing.size else ""
    return f"{drawing.steps}-steps-guidance-{drawing.guidance:g}{size}-{drawing.dtype}"
