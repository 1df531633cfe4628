"""`atedm.tune`: the plan nearest to dense that a model bears at a budget."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

import atedm
from atedm.app.devices import processor_of
from atedm.app.models import native_size
from atedm.costs.architectures import architecture
from atedm.files import check_writable, read_json, save_json
from atedm.hosts.models import find_model, is_transformer, spans_of
from atedm.lab.extra import optional
from atedm.method.presets import METHODS, TRANSFORMER_METHODS
from atedm.patch import is_applied
from atedm.plans.fingerprint import checksum, fingerprint
from atedm.plans.forecasting import can_forecast
from atedm.plans.plan import Plan, save_plan
from atedm.plans.schedulers import SCHEDULERS
from atedm.suits import suits
from atedm.tuning.claim import claim
from atedm.tuning.costs import Arithmetic
from atedm.tuning.drawing import Easel
from atedm.tuning.page import write_page
from atedm.tuning.prompts import tuning_prompts
from atedm.tuning.scores import further_scores
from atedm.tuning.search import Search, Tried
from atedm.tuning.space import Space
from atedm.tuning.timing import Times, images_timed, time_steps
from atedm.words import check_name, check_whole, is_number

BUDGETS_OF = ("time", "arithmetic")
PLAN, PAGE, SETTINGS, TIMES = "plan.json", "plan.html", "settings.json", "times.json"
FINALISTS = 3
"""Plans whose time is measured in turns with dense at the end."""
ROUNDS = 2

Progress = Callable[[str, float, float], None]
"""Told what is being done, how many dense images' worth is done, and of how many."""


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    #: The best of all.
    plan: Plan
    #: Everything that was measured, the best first; plans that were given up come last.
    tried: tuple[Tried, ...]
    #: The plan's file, and a page that shows the search.
    file: Path
    page: Path
    #: Whether it was stopped before its images were spent.
    was_stopped: bool


def tune(
    pipe: Any,
    budget: float = 0.5,
    *,
    of: str = "time",
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    images: float = 100,
    seed: int = 0,
    model: str | None = None,
    out: Path | str = Path("out/tune"),
    progress: Progress = lambda what, done, total: None,
) -> Tuned:
    """Find the plan whose images are nearest to dense ones at a budget: steps, scheduler, pruning and cache together.

        tuned = atedm.tune(pipe, budget=0.5)
        print(atedm.apply(pipe, tuned.plan))

    Single techniques at the budget are measured first, so the plan is never behind the best of them on these prompts.
    The same call goes on where it was stopped or killed, and ends with the same plan. Ctrl+C ends it with the best so
    far.

    Args:
        pipe: A text-to-image pipeline, as it is.
        budget: What a run may take, as a share of the dense run, in (0, 1).
        of: One of `BUDGETS_OF`: time measured here and now, or multiply-accumulates of the model.
        prompts: What to draw, 8 of a set of our own by default; a few of one's own are better.
        steps: Of the dense run; by default what suits the model.
        guidance: Scale; by default what suits the model.
        size: (width, height) in pixels; by default the model's own.
        images: What the search may take, in dense images.
        seed: Of the noise and of the search.
        model: Name of the model, by default that of the pipeline's files.
        out: Folder for the plan, its page and the images.
        progress: Told after every image. What it raises ends the search.

    Raises:
        ImportError: If the extra ``tune`` is not installed.
        TypeError: If the pipeline has nothing that can be pruned.
        ValueError: If an argument is out of its range, the pipeline is patched, ``out`` is of another search, or not
            one plan keeps to the budget.
    """
    optional("optuna", "tune")
    check_name("budget of", of, BUDGETS_OF)
    if not is_number(budget) or not 0 < budget < 1:
        raise ValueError(f"budget must be above 0 and below 1, a share of the dense run, not {budget!r}")
    if not is_number(images) or images <= 0:
        raise ValueError(f"images must be a number above 0, not {images!r}")
    denoiser = find_model(pipe)
    if is_applied(pipe):
        raise ValueError("this pipeline is patched, and a search begins with dense images; call atedm.remove first")
    name = model or str(getattr(pipe, "name_or_path", "") or pipe.config.get("_name_or_path", ""))
    suiting, out = suits(name), Path(out)
    prompts = tuple(tuning_prompts(name, 8) if prompts is None else prompts)
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty; give a line of text for each image")
    steps = suiting.steps if steps is None else steps
    check_whole("steps", steps)
    dense = Plan(
        model={"name": name, **fingerprint(pipe)},
        steps=steps,
        guidance=suiting.guidance if guidance is None else guidance,
        size=size,
    )
    check_writable(out / PLAN, out / PAGE)
    weights = checksum(denoiser)
    asked = {"model": dict(dense.model), **dense.settings(), "prompts": list(prompts), "seed": seed}
    claim(out / SETTINGS, asked | {"weights": weights, "dtype": str(denoiser.dtype)}, "a search with")
    easel = Easel(pipe, prompts, dense, seed, out / "images")
    branches = _caching(pipe, steps)
    arithmetic = Arithmetic.counted(architecture(pipe), size or native_size(pipe), branches)
    methods = TRANSFORMER_METHODS if is_transformer(denoiser) else METHODS
    spent, costs = 0.0, _costs(of, easel, arithmetic, branches, methods["matched"], out, progress)
    if of == "time":
        spent = images_timed(branches, steps)
    reserve = ROUNDS * (1 + FINALISTS * budget)
    # Solvers for few steps are written for models that predict noise or v; a flow's own is Euler's.
    schedulers = () if is_transformer(denoiser) else tuple(SCHEDULERS)
    space = Space(dense, costs, budget, branches, schedulers, methods)
    record = {
        "budget": budget,
        "of": of,
        "dense_steps": steps,
        "prompts": len(prompts),
        "prompts_checksum": zlib.crc32("\n".join(prompts).encode()),
        "seed": seed,
        "weights": weights,
        "machine": _machine(pipe),
        "versions": {"atedm": atedm.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }

    def recorded(best: Tried, **more: float) -> Plan:
        found = {
            **record,
            "share": round(best.share, 4),
            "cost": round(arithmetic.share(best.plan, steps), 4),
            "distance": round(best.distance, 3),
            "distances": [round(one, 3) for one in best.distances],
            "found_as": best.name,
            "images": round(search.spent, 1),
        }
        return dataclasses.replace(best.plan, found=found | more)

    def told(search: Search) -> None:
        best = search.best
        progress("first images" if best is None else f"{best.distance:.1f} dB by {best.name}", search.spent, images)

    def improved(search: Search) -> None:
        assert search.best is not None
        save_plan(recorded(search.best), out / PLAN)

    search = Search(easel, space, images - reserve, seed, spent=spent, told=told, improved=improved)
    was_stopped = False
    try:
        search.run()
    except KeyboardInterrupt:
        if search.best is None:
            raise
        was_stopped = True
    if search.best is None:
        raise ValueError(
            f"not one plan at a budget of {budget} could be drawn with {images:g} images; give more --images, fewer "
            "prompts or a higher budget"
        )
    finalists = search.finalists(FINALISTS)
    times: dict[str, list[float]] = {}
    if not was_stopped:
        times = _timed(easel, finalists, out, lambda: progress("times, in turns", search.spent, images))
        search.spent += reserve
    best = _chosen(finalists, times, budget if of == "time" else None)
    more: dict[str, float] = {}
    if times:
        ours, theirs = times[best.key], times["dense"]
        more = {
            "seconds": round(median(ours), 4),
            "dense_seconds": round(median(theirs), 4),
            "time": round(median(one / two for one, two in zip(ours, theirs, strict=True)), 4),
        }
    plan = recorded(best, **more, **further_scores(easel, best.plan))
    save_plan(plan, out / PLAN)
    tried = (*search.finalists(len(search.tried)), *(one for one in search.tried.values() if not one.is_whole))
    write_page(out / PAGE, plan, tried, easel)
    progress("done", search.spent, images)
    return Tuned(plan, tried, out / PLAN, out / PAGE, was_stopped)


def _caching(pipe: Any, steps: int) -> tuple[int | None, ...]:
    """Return at which branches DeepCache can be used, and None where a step can be forecast."""
    unet = find_model(pipe)
    if steps < 4 or pipe.scheduler.order != 1:
        return ()
    if is_transformer(unet):
        return (None,) if can_forecast(unet) else ()
    try:
        optional("DeepCache", "peers")
    except ImportError:
        return (None,)
    layers = unet.config.layers_per_block
    first = layers if isinstance(layers, int) else layers[0]
    usable = unet.mid_block is not None and bool(spans_of(unet))
    return ((0, 1, None) if first >= 2 else (0, None)) if usable else (None,)


def _costs(
    of: str,
    easel: Easel,
    arithmetic: Arithmetic,
    branches: Sequence[int | None],
    matched: Any,
    out: Path,
    progress: Progress,
) -> Arithmetic | Times:
    if of == "arithmetic":
        return arithmetic
    if not (out / TIMES).exists():  # measured once: a search that goes on must see the same times
        times = time_steps(easel, arithmetic, branches, matched, lambda: progress("times of steps", 0, 1))
        save_json(times.as_dict(), out / TIMES)
    try:
        return Times.from_dict(arithmetic, read_json(out / TIMES))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{out / TIMES} holds no times of steps ({error}); remove it to measure them") from error


def _timed(easel: Easel, finalists: Sequence[Tried], out: Path, told: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of whole images by name, dense among them, measured in turns and kept."""
    file, names = out / "seconds.json", ["dense", *(one.key for one in finalists)]
    if file.exists() and (stored := read_json(file)).keys() == set(names):
        return stored  # type: ignore[no-any-return]
    plans = [easel.dense, *(one.plan for one in finalists)]
    found = dict(zip(names, easel.seconds(plans, ROUNDS, told), strict=True))
    save_json(found, file)
    return found


def _chosen(finalists: Sequence[Tried], times: dict[str, list[float]], budget: float | None) -> Tried:
    """Return the best; of a budget of time, the best that kept to it within three hundredths when measured whole."""
    if budget is None or not times:
        return finalists[0]
    dense = median(times["dense"])
    kept = [one for one in finalists if median(times[one.key]) <= 1.03 * budget * dense]
    return kept[0] if kept else min(finalists, key=lambda one: median(times[one.key]))


def _machine(pipe: Any) -> dict[str, Any]:
    device = pipe.device
    dtype = str(find_model(pipe).dtype).removeprefix("torch.")
    found: dict[str, Any] = {"device": str(device), "name": processor_of(str(device)), "dtype": dtype}
    return found | {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
