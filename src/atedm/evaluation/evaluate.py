"""Draw, score and compare methods on equal prompts and noise: a run that resumes, and can be shared out by accelerate.

Layout of the folder: ``images/METHOD/00000.png`` and so on with what was drawn in ``settings.json``;
``images/reference``; ``results.json``; ``report.html`` with a sheet of images.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState

import atedm
from atedm.evaluation.images import Drawing, claim_folder, draw_groups, image_file, missing_groups
from atedm.evaluation.methods import Dense, Method, counted_run
from atedm.evaluation.prompts import Prompt, write_references
from atedm.evaluation.scores import DISTANCE, FID, LPIPS, Metrics, Scores, check_metrics, score
from atedm.evaluation.sharing import shared_work
from atedm.files import read_json, save_json
from atedm.pipelines import native_size

REFERENCE = "reference"

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Result:
    """One method's figures."""

    name: str
    method: Method
    #: Share of the dense run's multiply-accumulates, counted by torch on a run of one image.
    cost: float
    scores: Scores
    #: Where its images are.
    folder: Path

    def as_dict(self, dense: Result | None) -> dict[str, Any]:
        """Return plain JSON values, with paired differences to dense."""
        intervals = {name: list(interval) for name, interval in self.scores.intervals().items()}
        found: dict[str, Any] = {
            "name": self.name,
            "method": self.method.as_dict(),
            "cost": round(self.cost, 6),
            "images": self.folder.name,
            **intervals,
            "attributes": _shares(self.scores.accuracy),
        }
        if dense is not None and dense is not self:
            against = self.scores.difference(dense.scores)
            found["minus_dense"] = {name: list(interval) for name, interval in against.items()}
        return found


def _shares(accuracy: Mapping[str, tuple[list[int], list[int]]]) -> dict[str, float]:
    """Share of what was asked that is right, by attribute."""
    return {name: sum(right) / sum(asked) for name, (right, asked) in accuracy.items() if sum(asked)}


def slug(name: str) -> str:
    """Return ``name`` as the name of a folder; names that differ in signs only are told apart by a checksum."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()) & 0xFFFF:04x}"


def evaluate(
    pipe: Any,
    methods: Mapping[str, Method],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    metrics: Metrics,
    out: Path,
    *,
    state: PartialState | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Draw what is missing, score everything, and write ``results.json``.

    Dense is always among the methods if the distance to it is asked for.

    Args:
        pipe: A text-to-image pipeline, as it is.
        methods: By name.
        prompts: What to draw.
        drawing: What is the same for every method.
        metrics: Which figures, by which models.
        out: Where everything is kept.
        state: Of `accelerate`, where several processes share the work; each calls this function. None is
            `shared_work`.
        progress: Told of every group of images and every metric.

    Returns:
        The results in the order of the methods; an empty list in all processes but the first.

    Raises:
        ValueError: If FID is asked for of one image, a method cannot be applied, ``out`` holds images of something
            else, or the weights of a metric cannot be had; or as `shared_work`.
    """
    state = state or shared_work()
    if FID in metrics.names and _have_references(prompts) and len(prompts) < 2:
        raise ValueError("FID needs at least two images; ask for more captions, or leave fid out of the metrics")
    to_dense = DISTANCE in metrics.names or LPIPS in metrics.names
    if to_dense and not any(method == Dense() for method in methods.values()):
        methods = {"dense": Dense(), **methods}
    folders = {name: out / "images" / slug(name) for name in methods}
    undrawn = [name for name, folder in folders.items() if missing_groups(folder, len(prompts), drawing.batch)]
    for name in undrawn:
        try:
            with methods[name].applied(pipe):
                pass  # told now what cannot be applied, and not when all before it are drawn
        except ValueError as error:
            raise ValueError(f"{name} cannot be applied: {error}") from error
    weights = checksum(pipe.unet)
    if state.is_main_process:
        if undrawn:
            check_metrics(metrics, str(state.device), has_references=_have_references(prompts))
        for name, method in methods.items():
            claim_folder(folders[name], method, drawing, prompts, weights)
    state.wait_for_everyone()
    for name, method in methods.items():
        todo = missing_groups(folders[name], len(prompts), drawing.batch)
        state.wait_for_everyone()  # or one process would see what another has just drawn
        _draw_share(pipe, prompts, method, drawing, folders[name], todo, state, name, progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    references = _references(pipe, prompts, drawing, metrics, out, progress)
    results = _score(pipe, methods, folders, prompts, drawing, metrics, references, str(state.device), progress)
    save_json(_results_file(results, drawing, metrics, len(prompts), weights), out / "results.json")
    return results


def _draw_share(
    pipe: Any,
    prompts: Sequence[Prompt],
    method: Method,
    drawing: Drawing,
    folder: Path,
    todo: list[range],
    state: PartialState,
    name: str,
    progress: Progress | None,
) -> None:
    total = sum(len(group) for group in todo)
    done = 0

    def drawn(count: int) -> None:
        nonlocal done
        done += count * state.num_processes
        if progress is not None and state.is_main_process:
            progress(name, min(done, total), total)

    with state.split_between_processes(todo) as mine:
        draw_groups(pipe, prompts, method, drawing, folder, mine, drawn)


def _have_references(prompts: Sequence[Prompt]) -> bool:
    """Whether there is a real picture of every prompt, without which there is no FID."""
    return all(prompt.scene is not None or prompt.picture is not None for prompt in prompts)


def _references(
    pipe: Any, prompts: Sequence[Prompt], drawing: Drawing, metrics: Metrics, out: Path, progress: Progress | None
) -> Path | None:
    if FID not in metrics.names or not _have_references(prompts):
        return None
    width, height = native_size(pipe)
    folder = out / "images" / REFERENCE
    for index in write_references(prompts, folder, (drawing.width or width, drawing.height or height), drawing.seed):
        if progress is not None:
            progress("real pictures", index + 1, len(prompts))
    return folder


def _score(
    pipe: Any,
    methods: Mapping[str, Method],
    folders: Mapping[str, Path],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    metrics: Metrics,
    references: Path | None,
    device: str,
    progress: Progress | None,
) -> list[Result]:
    dense_folder = next((folders[name] for name, method in methods.items() if method == Dense()), None)
    dense_cost = _cost(pipe, Dense(), drawing, dense_folder)
    results = []
    for index, (name, method) in enumerate(methods.items()):

        def tell(what: str, name: str = name, index: int = index) -> None:
            if progress is not None:
                progress(f"{what} of {name}", index, len(methods))

        scores = score(
            folders[name],
            prompts,
            metrics,
            dense=None if method == Dense() else dense_folder,
            references=references,
            device=device,
            progress=tell,
        )
        cost = _cost(pipe, method, drawing, folders[name]) / dense_cost
        results.append(Result(name, method, cost, scores, folders[name]))
    return results


def _cost(pipe: Any, method: Method, drawing: Drawing, folder: Path | None) -> int:
    """MACs of a run of one image, kept beside the images, because counting takes a run."""
    file = None if folder is None else folder / "macs.json"
    if file is not None and file.exists():
        return int(read_json(file, int))
    macs = counted_run(
        pipe,
        method,
        "a picture",
        steps=drawing.steps,
        guidance=drawing.guidance,
        width=drawing.width,
        height=drawing.height,
    )
    if file is not None:
        save_json(macs, file)
    return macs


def _results_file(
    results: Sequence[Result], drawing: Drawing, metrics: Metrics, count: int, weights: int
) -> dict[str, Any]:
    dense = next((result for result in results if result.method == Dense()), None)
    return {
        "atedm": atedm.__version__,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "images": count,
        "weights": weights,
        "drawing": asdict(drawing),
        "metrics": asdict(metrics),
        "results": [result.as_dict(dense) for result in results],
    }


def checksum(unet: torch.nn.Module) -> int:
    """Tell one set of weights from another: a checksum of the first numbers of every parameter."""
    total = 0
    for name, parameter in sorted(unet.named_parameters()):
        first = parameter.detach().flatten()[:256].float().cpu().numpy().tobytes()
        total = zlib.crc32(name.encode() + first, total)
    return total


def image_of(result: Result, index: int) -> Path:
    """Return the file of one image of a method."""
    return image_file(result.folder, index)
