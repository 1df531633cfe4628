"""Draw, score and compare methods on equal prompts and noise: a run that resumes and can be shared out by accelerate.

Layout of the folder: ``images/METHOD/00000.png`` and so on with what was drawn in ``settings.json``, and
``images/reference`` with the real pictures.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from atedm.app.models import native_size
from atedm.files import read_json, save_json
from atedm.hosts.models import find_model
from atedm.lab.evaluation.images import Drawing, claim_folder, draw_groups, missing_groups
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.evaluation.references import write_references
from atedm.lab.evaluation.scoring import FID, Metrics, Scores, score
from atedm.lab.evaluation.sharing import shared_work
from atedm.lab.methods.candidates import Candidate, Dense
from atedm.lab.methods.counting import counted_run
from atedm.lab.progress import Progress, silent
from atedm.plans.fingerprint import checksum


@dataclass(frozen=True)
class Result:
    """One method's figures."""

    name: str
    candidate: Candidate
    #: Share of the dense run's multiply-accumulates, counted by torch on a run of one image.
    cost: float
    scores: Scores
    #: Where its images are.
    folder: Path

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

    Args:
        pipe: A text-to-image pipeline, as it is.
        methods: By name.
        prompts: What to draw.
        drawing: What is the same for every method.
        metrics: Which figures, by which models.
        out: Where images are kept.
        state: Of `accelerate`, where several processes share the work; each calls this function. None is
            `shared_work`.
        progress: Told of every group of images and every metric.

    Returns:
        The results in the order of the methods; an empty list in all processes but the first.

    Raises:
        ImportError: If a package is missing.
        ValueError: If FID is asked for of one image, a method cannot be applied, ``out`` holds images of something
            else, or the weights of a metric cannot be had; or as `shared_work`.
    """
    state = state or shared_work()
    has_references = all(prompt.has_reference for prompt in prompts)
    takes_fid = FID in metrics.names and has_references
    if takes_fid and len(prompts) < 2:
        raise ValueError("FID needs at least two images; ask for more captions, or leave fid out of the metrics")
    if metrics.to_dense and Dense() not in methods.values():
        methods = {"dense": Dense(), **methods}
    folders = {name: out / "images" / folder_name(name) for name in methods}
    left = {name: _images(missing_groups(folder, len(prompts), drawing.batch)) for name, folder in folders.items()}
    undrawn = [name for name, images in left.items() if images]
    for name in undrawn:  # tell now what cannot be applied, not when all methods before it are drawn
        try:
            with methods[name].applied(pipe):
                pass
        except ValueError as error:
            raise ValueError(f"{name} cannot be applied: {error}") from error
    if state.is_main_process:
        if undrawn:
            metrics.check(str(state.device), has_references=has_references)
        weights = checksum(find_model(pipe))
        for name, candidate in methods.items():
            claim_folder(folders[name], candidate, drawing, prompts, weights)
    state.wait_for_everyone()
    before, total = 0, sum(left.values())  # over all methods, so that the time left is that of the whole
    for name, candidate in methods.items():

        def tell_images(done: int, name: str = name) -> None:
            progress(name, done, total)

        _draw_share(pipe, prompts, candidate, drawing, folders[name], state, before, tell_images)
        before += left[name]
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


def _draw_share(
    pipe: Any,
    prompts: Sequence[Prompt],
    candidate: Candidate,
    drawing: Drawing,
    folder: Path,
    state: PartialState,
    before: int,
    tell: Callable[[int], None],
) -> None:
    """Draw this process' share of the groups; ``tell`` is told how many images there are, with those ``before``."""
    todo = missing_groups(folder, len(prompts), drawing.batch)
    state.wait_for_everyone()  # or one process would see what another has just drawn
    last, done = before + _images(todo), before

    def drawn(count: int) -> None:
        nonlocal done
        done = min(done + count * state.num_processes, last)
        tell(done)

    tell(done)
    with state.split_between_processes(todo) as mine:
        draw_groups(pipe, prompts, candidate, drawing, folder, mine, drawn)


def _images(groups: Sequence[Sequence[int]]) -> int:
    return sum(map(len, groups))


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
