"""A step of the U-Net with each of several methods, in turns in one run: the only times that compare."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from atedm.costs.architectures import architecture
from atedm.costs.fit import mean_share
from atedm.costs.latency import Spread
from atedm.costs.random_weights import random_unet
from atedm.costs.stopwatch import Stopwatch
from atedm.evaluation.methods import Dense, Merging, Method, Pruning
from atedm.generate import Progress
from atedm.patching.twins import twin_of
from atedm.pipelines import TINY, best_device, load_pipeline

_STEPS_BEFORE = 9
"""Times as many steps are taken to lie before those that are timed, so that no schedule spares anything in them."""


@dataclass(frozen=True)
class Timed:
    """What one method takes for a step."""

    method: dict[str, Any]
    #: Share of the dense multiply-accumulates of this step.
    arithmetic: float
    #: Milliseconds.
    step: Spread
    #: Over dense, each of the same round: what slows the machine for a while slows both.
    ratio: Spread


@dataclass(frozen=True)
class BenchReport:
    """The times of all methods, and everything they depend on."""

    model: str
    #: "shipped" or "random".
    weights: str
    #: (width, height) in pixels.
    size: tuple[int, int]
    batch: int
    guidance: bool
    dtype: str
    device: str
    processor: str
    threads: int
    repeats: int
    versions: dict[str, str]
    rows: dict[str, Timed]

    def headline(self) -> str:
        """Say in one line what was timed on what."""
        width, height = self.size
        return (
            f"{self.model}, {width} x {height} pixels, batch {self.batch} {'with' if self.guidance else 'without'} "
            f"guidance, {self.weights} weights in {self.dtype}, {self.processor}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}, torch {self.versions['torch']}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        rows = {
            name: {**asdict(row), "step": row.step._asdict(), "ratio": row.ratio._asdict()}
            for name, row in self.rows.items()
        }
        return {**asdict(self), "rows": rows}


def bench(
    model: str,
    methods: Mapping[str, Method],
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    repeats: int = 5,
    progress: Progress | None = None,
) -> BenchReport:
    """Time a normal step with each method, in turns, after one round to warm up.

    Dense runs diffusers' own attention, which is torch's fused one, and comes first whether it is named or not.

    Args:
        model: "tiny" with its own weights, or as `atedm.cost` with random ones: time does not ask what weights say.
        methods: By name. Pruning and ToMe, that is what acts within a step; what acts between steps needs a whole run.
        size: (width, height) in pixels; by default what the model was trained for.
        batch: Images at a time.
        guidance: Whether the U-Net runs on two of each; by default as the model is run.
        dtype: By default float32 on the CPU and float16 elsewhere.
        device: By default the fastest there is.
        repeats: Rounds that count.
        progress: Told of every method in every round.

    Raises:
        FileNotFoundError: If ``model`` is a folder that is not there.
        ValueError: If an argument is out of its range, or a method acts between steps.
    """
    for name, count in (("batch", batch), ("repeats", repeats)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    for name, method in methods.items():
        if not isinstance(method, Pruning | Merging) and method != Dense():
            raise ValueError(f"{name} acts between steps, so one step does not show what it takes")
    methods = {"dense": Dense(), **{name: method for name, method in methods.items() if method != Dense()}}
    arch = architecture(model)
    size = size or arch.default_size
    guidance = arch.guidance if guidance is None else guidance
    device = device or best_device()
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    shares = {name: step_share(model, method, size) for name, method in methods.items()}
    unet = load_pipeline(model, device=device, dtype=dtype).unet if model == TINY else random_unet(arch, dtype, device)
    call = arch.call(size, batch * (2 if guidance else 1), device=device, dtype=dtype)
    times = time_in_turns(unet, call, methods, repeats, progress)
    rows = {
        name: Timed(
            method.as_dict(),
            shares[name],
            Spread.of(times[name]),
            Spread.of([ours / dense for ours, dense in zip(times[name], times["dense"], strict=True)]),
        )
        for name, method in methods.items()
    }
    return BenchReport(
        model=model,
        weights="shipped" if model == TINY else "random",
        size=size,
        batch=batch,
        guidance=guidance,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        processor=torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        threads=torch.get_num_threads(),
        repeats=repeats,
        versions={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        rows=rows,
    )


_PACKAGES = ("torch", "diffusers", "tomesd")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def step_share(model: Any, method: Method, size: tuple[int, int]) -> float:
    """Share of the dense multiply-accumulates that a normal step takes, by formula, everything that is added counted.

    Where a choice of tokens is kept for several steps it is the mean of them.

    Args:
        model: As `atedm.cost`.
        method: Pruning, ToMe, or else dense.
        size: (width, height) in pixels.
    """
    if isinstance(method, Pruning):
        return mean_share(model, method.config.replace(schedule="constant"), size=size)
    if isinstance(method, Merging):
        return mean_share(model, replace(method.tome, prune_less_share=0.0), size=size)
    return 1.0


@torch.no_grad()
def time_in_turns(
    unet: UNet2DConditionModel,
    call: dict[str, Any],
    methods: Mapping[str, Method],
    repeats: int,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of a call of the U-Net with each method, in each round that counts.

    Rounds are steps of a run, one after another, so that what a method remembers from step to step is at hand.

    Args:
        unet: Not patched; it is left so, each method has a twin on its weights.
        call: Its arguments but for the timestep.
        methods: By name.
        repeats: Rounds after the one to warm up.
        progress: Told of every method in every round.
    """
    rounds = repeats + 1
    timesteps = torch.linspace(999, 0, (_STEPS_BEFORE + 1) * rounds, device=unet.device)[-rounds:]
    sample, words = call["sample"], {name: value for name, value in call.items() if name != "sample"}
    times: dict[str, list[float]] = {name: [] for name in methods}
    with ExitStack() as stack:
        twins = {name: twin_of(unet) for name in methods}
        for name, method in methods.items():
            stack.enter_context(method.applied(SimpleNamespace(unet=twins[name])))
        for done, timestep in enumerate(timesteps):
            for index, (name, twin) in enumerate(twins.items()):
                watch = Stopwatch(unet.device)
                twin(sample, timestep, **words)  # tomesd looks for the sample among what has no name
                watch.lap("step")
                times[name].append(watch.read()["step"])
                if progress is not None:
                    progress(name, done * len(methods) + index + 1, rounds * len(methods))
    return {name: values[1:] for name, values in times.items()}
