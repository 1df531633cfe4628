"""Time methods in turns in one run: steps of the U-Net, or whole images.

Every method has its turn once in every round, so that what slows the machine for a while slows all of them alike.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from atedm.app.models import load_pipeline
from atedm.costs.architectures import architecture
from atedm.hosts.models import find_model
from atedm.lab.bench.peak import peak_of
from atedm.lab.methods.candidates import Candidate, Dense
from atedm.lab.methods.counting import counted_run, late_step_cost, run_of_steps
from atedm.lab.progress import Progress, silent
from atedm.lab.random_unet import random_unet
from atedm.lab.setup import Setup
from atedm.lab.shared_weights import copy_with_shared_weights
from atedm.lab.timing import Spread, Stopwatch
from atedm.suits import suits
from atedm.words import check_whole

_MANY = 10**6
"""Steps, of which even a small share shows."""


@dataclass(frozen=True)
class Timed:
    """What one method takes."""

    method: dict[str, Any]
    cost: float  #: Share of the dense multiply-accumulates, everything that is added counted.
    time: Spread  #: Milliseconds.
    ratio: Spread  #: Over dense, each of the same round: what slows the machine for a while slows both.
    peak: int | None  #: Bytes of activations at the highest point of a call; None where they were not measured.


@dataclass(frozen=True)
class BenchReport:
    """The times of all methods, and everything they depend on."""

    setup: Setup
    #: Denoising steps of an image, with its own weights; None where single steps are timed, with random ones.
    steps: int | None
    rows: dict[str, Timed]

    @property
    def timed(self) -> str:
        """What times are of: a "step" of the U-Net, or an "image" from words to pixels."""
        return "step" if self.steps is None else "image"

    def headline(self) -> str:
        """Say in one line what was timed on what."""
        what = "a step with random weights" if self.steps is None else f"an image of {self.steps} steps"
        return f"{what} of {self.setup}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def bench(
    setup: Setup,
    methods: Mapping[str, Candidate],
    *,
    whole_images: bool | None = None,
    steps: int = 20,
    memory: bool = False,
    progress: Progress = silent,
) -> BenchReport:
    """Time each method, in turns, after one round to warm up.

    Dense comes first whether it is named or not, and runs diffusers' own attention, which is torch's fused one. A step
    is one in which no schedule spares anything, the mean of a cycle of what works in cycles.

    Steps are timed with random weights, because their time does not depend on them. By default whole images of
    ``steps`` steps are timed, from words to pixels, where the weights are at hand. ``memory`` measures the peak of
    activations too, in one round more. Raises an `ImportError` if a package of a method is missing, and a `ValueError`
    if ``steps`` is below 1, or a step does not show what a method does.
    """
    check_whole("steps", steps)
    whole_images = setup.has_weights() if whole_images is None else whole_images
    for name, candidate in methods.items():
        if candidate.steps_of(_MANY) != _MANY and not whole_images:
            raise ValueError(f"{name} takes fewer steps, which a single step does not show; time whole images")
    methods = {"dense": Dense(), **{name: each for name, each in methods.items() if each != Dense()}}
    if whole_images:
        pipe = load_pipeline(setup.model, device=setup.device, dtype=setup.torch_dtype)
        usual = suits(setup.model)
        guidance = (usual.guidance or 7.0) if setup.guidance else 0.0
        call: dict[str, Any] = {"guidance_scale": guidance, "width": setup.size[0], "height": setup.size[1]}
        macs = {name: counted_run(pipe, each, {"prompt": "a picture", **call}, steps) for name, each in methods.items()}
        costs = {name: count / macs["dense"] for name, count in macs.items()}
        call["prompt"] = [usual.prompts[i % len(usual.prompts)] for i in range(setup.batch)]
        turns = images_in_turns(pipe, call, methods, steps, setup.repeats, progress, memory=memory)
    else:
        arch = architecture(setup.model)
        meta, small = arch.on_meta(), arch.call(setup.size)
        costs = {name: late_step_cost(meta, small, each) for name, each in methods.items()}
        unet = random_unet(arch, setup.torch_dtype, setup.device)
        turns = steps_in_turns(unet, setup.call(), methods, setup.repeats, progress, memory=memory)
    rows = {}
    for name, (times, peak) in turns.items():
        ratios = [ours / theirs for ours, theirs in zip(times, turns["dense"].times, strict=True)]
        rows[name] = Timed(methods[name].as_dict(), costs[name], Spread.of(times), Spread.of(ratios), peak)
    return BenchReport(setup, steps if whole_images else None, rows)


class Turns(NamedTuple):
    """What a method took."""

    times: list[float]  #: Milliseconds of each round that counts.
    peak: int | None  #: Bytes of activations at the highest point of one call more; None if they were not asked for.


class _Turn(NamedTuple):
    """What a method does in a round."""

    act: Callable[[], object]
    applied: Callable[[], AbstractContextManager[object]] = nullcontext  #: What surrounds it and is not timed.
    steps: int = 1  #: How many steps it takes; its time is divided by them.


@torch.no_grad()
def steps_in_turns(
    model: Any,
    call: dict[str, Any],
    methods: Mapping[str, Candidate],
    repeats: int,
    progress: Progress,
    *,
    memory: bool = False,
) -> dict[str, Turns]:
    """Time a call of a model with each method, the mean over a cycle of those that work in cycles.

    Rounds are steps of a run, one after another, so that what a method remembers from step to step is at hand. Each
    method has a copy of the model on its weights; ``call`` is what it takes besides the timestep.
    """
    with ExitStack() as stack:
        turns = {}
        for name, candidate in methods.items():
            steps = candidate.cycle * (repeats + 1 + memory)
            copied = copy_with_shared_weights(model)
            step = stack.enter_context(run_of_steps(copied, call, candidate, steps))
            turns[name] = _Turn(step, steps=candidate.cycle)
        return _in_turns(turns, model.device, repeats, progress, memory)


def images_in_turns(
    pipe: Any,
    call: Mapping[str, Any],
    methods: Mapping[str, Candidate],
    steps: int,
    repeats: int,
    progress: Progress,
    *,
    memory: bool = False,
) -> dict[str, Turns]:
    """Time whole images with each method, from words to pixels, always from the same noise.

    Applying and removing are not part of it; ``call`` is what the pipeline takes besides steps and noise.
    """

    def draw(candidate: Candidate) -> object:
        noise = torch.Generator("cpu").manual_seed(0)
        return pipe(**call, num_inference_steps=candidate.steps_of(steps), generator=noise)

    turns = {name: _Turn(partial(draw, each), partial(each.applied, pipe)) for name, each in methods.items()}
    return _in_turns(turns, find_model(pipe).device, repeats, progress, memory)


def _in_turns(
    turns: Mapping[str, _Turn], device: torch.device, repeats: int, progress: Progress, memory: bool
) -> dict[str, Turns]:
    """Take every turn once a round."""
    rounds = repeats + 1 + memory
    times: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int | None] = dict.fromkeys(turns)

    def take(turn: _Turn) -> None:
        for _ in range(turn.steps):
            turn.act()

    for done in range(rounds):
        for index, (name, turn) in enumerate(turns.items()):
            with turn.applied():
                if done > repeats:
                    peaks[name] = peak_of(partial(take, turn), device)
                else:
                    watch = Stopwatch(device)
                    take(turn)
                    watch.lap("turn")
                    times[name].append(watch.read()["turn"] / turn.steps)
            progress(name, done * len(turns) + index + 1, rounds * len(turns))
    return {name: Turns(values[1:], peaks[name]) for name, values in times.items()}
