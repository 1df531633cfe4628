"""`atedm.fit`: matrices that predict what a plan's refill gets wrong, by least squares on the model's own runs.

No data but prompts, and no gradients. The steps are fitted one after another. For each prompt the pruned model draws up
to the step, with what was fitted so far; the same call is then run dense, and says what the refill should have given.
Ridge regression of the difference on what the refill knows (`atedm.method.correction`) gives one matrix a span, once
with what is known of groups and once without: on U-Nets that part does harm. The better ones are kept if they bring
images of other prompts nearer to the dense ones. After two steps in which they do not, it ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from atedm.hosts.models import find_model, spans_of
from atedm.lab.extra import optional
from atedm.lab.methods.candidates import Dense, Planned
from atedm.lab.methods.counting import counted_run
from atedm.method.correction import Correction, Corrector
from atedm.patch import is_applied, pruned
from atedm.plans.applied import part_of
from atedm.plans.fingerprint import checksum, refuse_other_model
from atedm.plans.fitted import read_correction, save_correction, with_correction
from atedm.plans.plan import Plan, save_plan
from atedm.plans.schedulers import scheduled
from atedm.tuning.claim import claim
from atedm.tuning.dense_spans import run_dense
from atedm.tuning.drawing import call_of
from atedm.tuning.refill_errors import Enough, Equations, Watch
from atedm.words import check_whole

PLAN, FIT, SETTINGS = "plan.json", "fit.safetensors", "fit.json"
JUDGED_SHARE = 0.25
"""Share of the prompts that matrices are judged on and not fitted on."""
WORTH = 0.1
"""How many dB nearer to dense the matrices of a step must bring the images, at the lower end of a 95 % interval."""
MEASURED = (
    "share",
    "cost",
    "distance",
    "distances",
    "lpips",
    "clip_score",
    "dense_clip_score",
    "seconds",
    "dense_seconds",
    "time",
)
"""What a search measured without the matrices, and a fitted plan does not say."""
VIDEO = ("3D", "Video")
"""Parts of the names of models that draw videos."""
PATIENCE = 2
"""Steps in a row without worth after which no more are tried."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fitted:
    """What a fit gave."""

    #: The plan, which names the matrices if any was kept.
    plan: Plan
    file: Path
    #: Mean distance to dense in dB of the judged images without matrices.
    before: float
    #: The same by each step that was tried, with its matrices and those kept before it. These images also chose which
    #: are kept, so others are a little farther from dense.
    distances: Mapping[int, float]
    #: Steps whose matrices were kept.
    steps: tuple[int, ...]


def fit(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    out: Path | str = Path("out/fit"),
    *,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Fitted:
    """Fit the refill of a plan, and write the matrices with a plan that names them.

    The same call goes on after the last step that was done where it was stopped or killed.

    Args:
        pipe: The pipeline of images that the plan is for, as it is. Left as it was.
        plan: Of matched pruning that remembers updates, without a cache, a LoRA or a fit.
        prompts: What to draw: at least 8; a quarter of them judges.
        out: Folder for ``fit.safetensors`` and ``plan.json``, another one than the plan's.
        seed: Of the noise of the first prompt.
        progress: Told of every run.

    Raises:
        ImportError: If the extra ``tune`` is not installed.
        TypeError: If there is nothing that can be pruned, or no pipeline of images.
        ValueError: If the plan is for another model or of another kind, the pipeline is patched, there are too few
            prompts, or ``out`` is the plan's own folder or holds a fit of something else.
    """
    optional("scipy", "tune")
    model, out = find_model(pipe), Path(out)
    if not hasattr(pipe, part_of(model)) or any(name in type(model).__name__ for name in VIDEO):
        raise TypeError("a fit draws images from prompts; give the whole pipeline, not compiled, of a model of images")
    if is_applied(pipe):
        raise ValueError("this pipeline is patched, and a fit begins with dense runs; call atedm.remove first")
    refuse_other_model(plan.model, pipe)
    if plan.method is None:
        raise ValueError("this plan prunes nothing, so there is nothing that a fit could win back")
    with_correction(plan.method, None)  # refuses other methods
    if not plan.method.remembers:
        raise ValueError("a fit goes by the updates of the step before, and own_update_share=0 remembers none")
    if plan.folder is not None and plan.folder.resolve() == out.resolve():
        raise ValueError(f"{out} is the folder of the plan, which the fitted one would replace; give another --out")
    if set_already := [name for name in ("cache", "lora", "fit") if getattr(plan, name) is not None]:
        raise ValueError(f"this plan has a {set_already[0]}; a fit is found for a plan of pruning alone")
    if len(prompts) < 8 or not all(prompt.strip() for prompt in prompts):
        raise ValueError("a fit needs 8 prompts or more, none of them empty")
    check_whole("seed", seed, 0)
    weights = checksum(model)
    asked = {"plan": plan.settings(), "prompts": list(prompts), "seed": seed, "weights": weights}
    claim(out / SETTINGS, asked, "a fit of")
    with scheduled(pipe, plan.scheduler):
        job = _Job(pipe, model, plan, prompts, seed, progress)
        state = _resumed(out / FIT, job)
        while not state.is_over:
            step = state.done
            matrices = job.matrices(step, state.maps)
            state.is_over = matrices is None
            tried = [_stacked(state.maps, found, step) for found in matrices or ()]
            if tried:
                judged = [job.distances(one, f"judging step {step + 1}") for one in tried]
                best = max(range(len(tried)), key=lambda index: mean(judged[index]))
                state.judge(step, tried[best], judged[best])
            state.done = step + 1
            save_correction(state.maps, out / FIT, state.metadata())
    facts = {
        "prompts": len(prompts),
        "seed": seed,
        "steps": state.kept,
        "before": mean(state.before),
        "after": mean(state.best),
    }
    found = {name: value for name, value in plan.found.items() if name not in MEASURED} | {"weights": weights}
    fitted = dataclasses.replace(plan, fit=FIT if state.kept else None, folder=out, found=found)
    progress("counting what it costs", 0, 1)
    cost = round(_cost(pipe, fitted, prompts[0]), 4)
    fitted = dataclasses.replace(fitted, found={**found, "fit": facts, "cost": cost})
    save_plan(fitted, out / PLAN)
    distances = {step: mean(found) for step, found in state.distances.items()}
    return Fitted(fitted, out / PLAN, mean(state.before), distances, tuple(state.kept))


def _cost(pipe: Any, plan: Plan, prompt: str) -> float:
    """Return what a run by a plan costs, as torch counts it: a share of the dense run."""
    call = {name: value for name, value in call_of(plan, 0).items() if name not in ("num_inference_steps", "generator")}
    steps = int(plan.found.get("dense_steps", plan.steps))
    ours, dense = (counted_run(pipe, one, {"prompt": prompt, **call}, steps) for one in (Planned(plan), Dense()))
    return ours / dense


@dataclass
class _State:
    """What is known after some steps."""

    #: Distances in dB of the judged images without matrices, and by step with its own and those kept before it.
    before: list[float]
    maps: dict[str, Tensor] = field(default_factory=dict)
    distances: dict[int, list[float]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    done: int = 0
    misses: int = 0
    is_over: bool = False

    @property
    def best(self) -> list[float]:
        """The distances by the matrices that were kept."""
        return self.distances[self.kept[-1]] if self.kept else self.before

    def judge(self, step: int, tried: dict[str, Tensor], distances: list[float]) -> None:
        """Keep the matrices of a step if they are worth it."""
        gains = [ours - theirs for ours, theirs in zip(distances, self.best, strict=True)]
        self.distances[step] = distances
        if mean(gains) - _half_interval(gains) >= WORTH:
            self.maps, self.misses = tried, 0
            self.kept.append(step)
        else:
            self.misses += 1
            self.is_over = self.misses >= PATIENCE

    def metadata(self) -> dict[str, str]:
        """Return all but the matrices as safetensors keeps it."""
        rest = {name: value for name, value in vars(self).items() if name != "maps"}
        return {"state": json.dumps(rest)}


def _resumed(file: Path, job: _Job) -> _State:
    if not file.exists():
        return _State(job.distances({}, "judging the plan as it is"))
    maps = read_correction(file, spans_of(job.model)).maps
    with safe_open(file, "pt") as opened:
        rest = json.loads(opened.metadata()["state"])
    rest["distances"] = {int(step): distance for step, distance in rest["distances"].items()}
    return _State(maps=dict(maps), **rest)


@dataclass
class _Job:
    """Draws what a fit needs."""

    pipe: Any
    model: Any
    plan: Plan
    prompts: Sequence[str]
    seed: int
    progress: Progress
    dense: list[Tensor] = field(default_factory=list)

    @property
    def learned(self) -> int:
        """How many of the prompts are fitted on; the others judge."""
        return len(self.prompts) - max(1, round(JUDGED_SHARE * len(self.prompts)))

    def matrices(self, step: int, maps: Mapping[str, Tensor]) -> list[dict[str, Tensor]] | None:
        """Fit one step, without and with what is known of groups: (4C, C) by span.

        An empty list if it drops nothing, or has nothing to remember and is not the first; None after the last step.
        """
        equations: dict[str, Equations] = {}
        for index in range(self.learned):
            self.progress(f"fitting step {step + 1}", index, self.learned)
            watch = Watch(step, Correction(maps))
            hook = self.model.register_forward_pre_hook(watch.note, with_kwargs=True)
            try:
                self._draw(index, watch)
            except Enough:
                pass
            finally:
                hook.remove()
            if watch.latest < step:
                return None
            if not watch.seen or (step > 0 and all(refill.last is None for _, refill in watch.seen)):
                return []
            for call in {id(call): call for call, _ in watch.seen}.values():
                given = run_dense(self.model, self.method(None), *call, pipe=self.pipe)
                for refill in (refill for of, refill in watch.seen if of is call):
                    equations.setdefault(refill.span, Equations()).learn(refill, given[refill.span])
        return [
            {span: one.solve(groups=groups).to(self.model.dtype) for span, one in equations.items()}
            for groups in (False, True)
        ]

    def distances(self, maps: Mapping[str, Tensor], what: str) -> list[float]:
        """Return the distances in dB of the judged prompts to their dense images."""
        judged = range(self.learned, len(self.prompts))
        if not self.dense:
            for done, index in enumerate(judged):
                self.progress("drawing dense", done, len(judged))
                self.dense.append(self._image(index, None))
        found = []
        for done, (index, dense) in enumerate(zip(judged, self.dense, strict=True)):
            self.progress(what, done, len(judged))
            error = (self._image(index, Correction(maps)) - dense).double().square().mean().item()
            found.append(-10 * math.log10(max(error, 1e-12)))
        return found

    def method(self, correction: Corrector | None) -> Any:
        """Return the plan's method with a correction."""
        assert self.plan.method is not None
        return with_correction(self.plan.method, correction)

    def _draw(self, index: int, correction: Corrector) -> None:
        with pruned(self.pipe, self.method(correction)):
            self.pipe(self.prompts[index], output_type="latent", **call_of(self.plan, self.seed + index))

    def _image(self, index: int, correction: Corrector | None) -> Tensor:
        """Draw an image, (H, W, 3) in [0, 1]: pruned with a correction, dense without."""
        with nullcontext() if correction is None else pruned(self.pipe, self.method(correction)):
            images = self.pipe(self.prompts[index], output_type="np", **call_of(self.plan, self.seed + index)).images
        return torch.from_numpy(images[0])


def _half_interval(values: Sequence[float]) -> float:
    """Return how far the mean of some values may be off, at 95 %."""
    from scipy.stats import t

    quantile: float = t.ppf(0.975, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def _stacked(maps: Mapping[str, Tensor], found: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """Add the matrices of a step to those of the steps before it; steps between have zeros."""
    stacked = dict(maps)
    for span, one in found.items():
        before = maps.get(span, one.new_zeros(0, *one.shape))
        gap = one.new_zeros(step - len(before), *one.shape)
        stacked[span] = torch.cat([before, gap, one.unsqueeze(0)])
    return stacked
