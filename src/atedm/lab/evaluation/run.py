"""Draw, score and compare methods on equal prompts and noise: a run that resumes and can be shared out by accelerate.

An experiment is such a run under each of its settings. The folder of one: ``images/METHOD/00000.png`` and so on with
what was drawn in ``settings.json``, and ``images/reference`` with the real pictures.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from atedm.app.models import native_size
from atedm.costs.budget import CostOutOfReach
from atedm.files import read_json, save_json
from atedm.hosts.models import find_model
from atedm.lab.evaluation.experiments import Experiment
from atedm.lab.evaluation.images import Drawing, claim_folder, draw_group, missing_groups
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.evaluation.references import load_objects, write_references
from atedm.lab.evaluation.scoring import DISTANCE, FID, LPIPS, Metrics, Scores, score
from atedm.lab.evaluation.sharing import shared_work
from atedm.lab.methods.by_name import method_by_name
from atedm.lab.methods.candidates import Candidate, Dense
from atedm.lab.methods.counting import counted_run
from atedm.lab.progress import Progress, silent
from atedm.plans.fingerprint import checksum


@dataclass(frozen=True)
class Result:
    """One method's figures."""

    name: str
    candidate: Candidate
    cost: float  #: Share of the dense run's multiply-accumulates, counted by torch on a run of one image.
    scores: Scores
    folder: Path  #: Where its images are.

    def as_dict(self, dense: Result | None) -> dict[str, Any]:
        """Return plain JSON values, with paired differences to dense."""
        found: dict[str, Any] = {"name": self.name, "method": self.candidate.as_dict(), "cost": round(self.cost, 6)}
        found |= {"images": self.folder.name, **self.scores.intervals(), "attributes": self.scores.attributes()}
        if dense is not None and dense is not self:
            found["minus_dense"] = self.scores.difference(dense.scores)
        return found


def evaluate(
    pipe: Any,
    methods: Mapping[str, Candidate],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    metrics: Metrics,
    out: Path,
    *,
    state: PartialState | None = None,
    progress: Progress = silent,
) -> list[Result]:
    """Draw what is missing, and score everything. Dense is always there if a distance to it is asked for.

    Where several processes share the work, each calls this with its ``state`` of `accelerate`, by default that of
    `shared_work`. ``progress`` is told of every group of images and every metric. The results are in the order of the
    methods, and empty in all processes but the first.

    Raises as `shared_work`, a `FileNotFoundError` if FID of scenes is asked for and their objects cannot be fetched, an
    `ImportError` if a package is missing, and a `ValueError` if FID is asked for of one image, a method cannot be
    applied, ``out`` holds images of something else, or the weights of a metric cannot be had.
    """
    state = state or shared_work()
    has_references = all(prompt.has_reference for prompt in prompts)
    takes_fid = FID in metrics.names and has_references
    if takes_fid and len(prompts) < 2:
        raise ValueError("FID needs at least two images; ask for more captions, or leave fid out of the metrics")
    if {DISTANCE, LPIPS} & {*metrics.names} and Dense() not in methods.values():
        methods = {"dense": Dense(), **methods}
    folders = {name: out / "images" / folder_name(name) for name in methods}
    # Before anything is drawn, or one process would see what another has just drawn.
    todo = {name: missing_groups(folder, len(prompts), drawing.batch) for name, folder in folders.items()}
    for name in filter(todo.get, methods):  # tell now what cannot be applied, not when all methods before it are drawn
        try:
            with methods[name].applied(pipe):
                pass
        except ValueError as error:
            raise ValueError(f"{name} cannot be applied: {error}") from error
    if state.is_main_process:
        if any(todo.values()):
            metrics.check(str(state.device), has_references=has_references)
            if takes_fid and any(prompt.scene is not None for prompt in prompts):
                load_objects()
        weights = checksum(find_model(pipe))
        for name, candidate in methods.items():
            claim_folder(folders[name], candidate, drawing, prompts, weights)
    state.wait_for_everyone()
    last, total = 0, sum(len(group) for groups in todo.values() for group in groups)
    for name, candidate in methods.items():
        done, last = last, last + sum(map(len, todo[name]))
        progress(name, done, total)  # over all methods, so that the time left is that of the whole
        with state.split_between_processes(todo[name]) as mine:
            for group in mine:
                draw_group(pipe, prompts, candidate, drawing, folders[name], group)
                done = min(done + len(group) * state.num_processes, last)
                progress(name, done, total)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    references = out / "images" / "reference" if takes_fid else None
    if references is not None:
        width, height = native_size(pipe)
        size = (drawing.width or width, drawing.height or height)
        for index in write_references(prompts, references, size, drawing.seed):
            progress("real pictures", index + 1, len(prompts))
    dense = next((folders[name] for name, candidate in methods.items() if candidate == Dense()), None)
    dense_macs = _macs(pipe, Dense(), drawing, dense)
    results = []
    for index, (name, candidate) in enumerate(methods.items()):

        def tell(what: str, name: str = name, index: int = index) -> None:
            progress(f"{what} of {name}", index, len(methods))

        base = None if candidate == Dense() else dense
        device = str(state.device)
        scores = score(folders[name], prompts, metrics, dense=base, references=references, device=device, progress=tell)
        cost = _macs(pipe, candidate, drawing, folders[name]) / dense_macs
        results.append(Result(name, candidate, cost, scores, folders[name]))
    return results


def _macs(pipe: Any, candidate: Candidate, drawing: Drawing, folder: Path | None) -> int:
    """MACs of a run of one image, kept beside the images, because counting takes a run."""
    file = None if folder is None else folder / "macs.json"
    if file is not None and file.exists():
        return int(read_json(file, int))
    macs = counted_run(pipe, candidate, {"prompt": "a picture", **drawing.call}, drawing.steps)
    if file is not None:
        save_json(macs, file)
    return macs


def folder_name(method: str) -> str:
    """Return a method's name as that of a folder; names that differ in signs only are told apart by a checksum."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", method).strip("-")
    return plain if plain == method else f"{plain}-{zlib.crc32(method.encode()) & 0xFFFF:04x}"


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
    """Run an experiment, as `evaluate` under each of its settings, of which each has an outcome.

    Images are kept by setting and method, so that experiments share them and runs resume. An experiment of ours leaves
    out what is not for this kind of model; of a list of one's own each method must run. It raises as `evaluate`, or a
    `ValueError` if nothing is left.
    """
    outcomes = []
    labels = {spec: label for label, spec in experiment.methods.items()}
    for guidance in experiment.guidance or (drawing.guidance,):
        here = replace(drawing, guidance=guidance)
        methods: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        for label, spec in experiment.methods.items():
            try:
                candidate = method_by_name(spec, here.model, size=here.size, steps=here.steps)
                if experiment.source:
                    with candidate.applied(pipe):
                        pass
            except ValueError as error:
                if not experiment.source and not isinstance(error, CostOutOfReach):
                    raise
                left_out[label] = str(error)
            else:
                methods[spec] = candidate
        if not methods:
            raise ValueError(next(iter(left_out.values())))
        folder = out / setting_name(here)
        found = evaluate(pipe, methods, prompts, here, metrics, folder, state=state, progress=progress)
        named = tuple(replace(result, name=labels.get(result.name, result.name)) for result in found)
        outcomes.append(Outcome(here, named, {"guidance": guidance} if experiment.guidance else {}, left_out))
    return outcomes


def setting_name(drawing: Drawing) -> str:
    """Name of the folder that holds the images of a setting."""
    size = f"-{drawing.width}x{drawing.height}" if drawing.size else ""
    return f"{drawing.steps}-steps-guidance-{drawing.guidance:g}{size}-{drawing.dtype}"
