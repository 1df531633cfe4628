"""Time methods in turns in one run: steps of the U-Net, or whole images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from atedm.app.models import load_pipeline
from atedm.costs.architectures import architecture
from atedm.lab.bench.turns import Turns, images_in_turns, steps_in_turns
from atedm.lab.methods.candidates import Candidate, Dense
from atedm.lab.methods.counting import counted_run, late_step_cost
from atedm.lab.progress import Progress, silent
from atedm.lab.random_unet import random_unet
from atedm.lab.setup import Setup
from atedm.lab.timing import Spread
from atedm.suits import suits
from atedm.words import check_whole

_MANY = 10**6
"""Steps, of which even a small share shows."""


@dataclass(frozen=True)
class Timed:
    """What one method takes."""

    method: dict[str, Any]
    #: Share of the dense multiply-accumulates, everything that is added counted.
    cost: float
    #: Milliseconds.
    time: Spread
    #: Over dense, each of the same round: what slows the machine for a while slows both.
    ratio: Spread
    #: Bytes of activations at the highest point of a call; None where they were not measured.
    peak: int | None


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
    activations too, in one round more.

    Raises:
        ImportError: If a package of a method is missing.
        ValueError: If ``steps`` is below 1, or a step does not show what a method does.
    """
    check_whole("steps", steps)
    whole_images = setup.has_weights() if whole_images is None else whole_images
    for name, candidate in methods.items():
        if candidate.steps_of(_MANY) != _MANY and not whole_images:
            raise ValueError(f"{name} takes fewer steps, which a single step does not show; time whole images")
    methods = {"dense": Dense(), **{name: each for name, each in methods.items() if each != Dense()}}
    costs: dict[str, float]
    turns: dict[str, Turns]
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
    dense = turns["dense"].times
    rows = {
        name: Timed(
            methods[name].as_dict(),
            costs[name],
            Spread.of(took.times),
            Spread.of([ours / theirs for ours, theirs in zip(took.times, dense, strict=True)]),
            took.peak,
        )
        for name, took in turns.items()
    }
    return BenchReport(setup, steps if whole_images else None, rows)
