"""What each part of pruning takes, beside a dense step: supplement Fig. 4, on the machine at hand.

The parts are the package's own functions on random tokens, timed in one block of each shape, and multiplied by how
many such blocks a run prunes how often. The way to the attention map is the one that differs, so each is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from atedm.config import PruningConfig, preset
from atedm.costs.architectures import Architecture, architecture
from atedm.costs.machine import processor_of, versions_of
from atedm.costs.pruning_parts import PARTS, WAYS, PrunedShape, prune_once, pruned_shapes, why_not
from atedm.costs.random_weights import random_unet
from atedm.costs.stopwatch import Stopwatch
from atedm.generate import Progress
from atedm.patching.apply import pruned
from atedm.patching.summary import PatchSummary
from atedm.pipelines import TINY, best_device, load_pipeline, usual_dtype

PAPER = {
    "paper": dict(zip(PARTS, (1961.0, 1275.0, 317.0, 91.0, 275.0), strict=True)),
    "dagger": dict(zip(PARTS, (256.0, 160.0, 78.0, 48.0, 132.0), strict=True)),
}
"""The paper's ms a run of 50 steps of SD-XL on one A100 (supplement Fig. 4), by preset."""


# --- The report -------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """What several repeats gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class WayLatency:
    """What the parts take with one way to the attention map."""

    #: Milliseconds a run, by part. Empty if the way was passed over.
    run: dict[str, float]
    #: Milliseconds in one block, by part, for each of the report's shapes.
    per_block: tuple[dict[str, float], ...]
    #: Why it was passed over, if it was.
    skipped: str = ""


@dataclass(frozen=True)
class LatencyReport:
    """The time of each part of pruning, of a dense step, and everything they depend on."""

    model: str
    #: "shipped" or "random".
    weights: str
    config: dict[str, Any]
    #: (width, height) in pixels.
    size: tuple[int, int]
    #: Images at a time.
    batch: int
    #: Whether the U-Net runs on two of each image.
    guidance: bool
    steps: int
    dtype: str
    device: str
    processor: str
    threads: int
    repeats: int
    versions: dict[str, str]
    #: A whole call of the U-Net, in milliseconds.
    dense_step: Spread
    #: The same, patched, in a step in which no block is spared.
    pruned_step: Spread
    #: Pruned over dense, each of the same round: what slows the machine for a while slows both.
    step_ratio: Spread
    shapes: tuple[PrunedShape, ...]
    ways: dict[str, WayLatency]

    @property
    def dense_run(self) -> float:
        """Milliseconds of a dense run: of its U-Net calls, that is."""
        return self.steps * self.dense_step.median

    def headline(self) -> str:
        """Say in one line what was timed on what."""
        width, height = self.size
        return (
            f"{self.model}, {width} x {height} pixels, batch {self.batch} {'with' if self.guidance else 'without'} "
            f"guidance, {self.steps} steps, {self.weights} weights in {self.dtype}, on {self.processor}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values, with each part as a share of the dense run."""
        shares = {
            name: {part: time / self.dense_run for part, time in way.run.items()} for name, way in self.ways.items()
        }
        fields = asdict(self)
        for name in ("dense_step", "pruned_step", "step_ratio"):
            fields[name] = getattr(self, name)._asdict()
        return fields | {"dense_run": self.dense_run, "share_of_dense_run": shares}


# --- Timing -----------------------------------------------------------------------------------------------------------


def latency(
    model: str,
    config: PruningConfig | str = "paper",
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    steps: int = 50,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    repeats: int = 5,
    progress: Progress | None = None,
) -> LatencyReport:
    """Time the parts of pruning and the whole U-Net, dense and patched.

    Times are medians over ``repeats`` rounds after one to warm up. In each round everything is timed once, so that
    what else the machine does meets all alike.

    Args:
        model: As `atedm.costs.architectures.architecture`; "tiny" runs its own weights, all others random ones.
        config: A config or the name of a preset. Ranking, head fusion and recovery must be the paper's, and iterations
            a fixed count.
        size: (width, height) in pixels; by default what the model was trained for.
        batch: Images at a time.
        guidance: Whether the U-Net runs on two of each; by default as the model is run.
        steps: Steps of the run that the parts add up over.
        dtype: By default float32 on the CPU and float16 elsewhere.
        device: By default CUDA, else MPS, else the CPU.
        repeats: Rounds.
        progress: Told of every round.

    Raises:
        FileNotFoundError: If ``model`` is a folder that is not there.
        ValueError: If an argument is out of its range, or there is nothing to prune.
    """
    config = preset(config) if isinstance(config, str) else config
    _refuse_other_parts(config)
    for name, count in (("batch", batch), ("steps", steps), ("repeats", repeats)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    arch = architecture(model)
    size = size or arch.default_size
    guidance = arch.guidance if guidance is None else guidance
    device = device or best_device()
    dtype = dtype or usual_dtype(device)
    summary = _summary(arch, config, size)  # before any work: refuses what cannot be pruned
    shapes = pruned_shapes(summary, steps)
    if not shapes:
        raise ValueError(f"there is nothing to time: at a pruning_rate of {config.pruning_rate} no token is dropped")
    unet = load_pipeline(model, device=device, dtype=dtype).unet if model == TINY else random_unet(arch, dtype, device)
    call = arch.call(size, batch * (2 if guidance else 1), device=device, dtype=dtype)
    ways = time_parts(unet, shapes, config, len(call["sample"]), repeats, progress)
    dense, patched, ratio = time_steps(unet, call, config, repeats, progress)
    return LatencyReport(
        model=model,
        weights="shipped" if model == TINY else "random",
        config=config.as_dict(),
        size=size,
        batch=batch,
        guidance=guidance,
        steps=steps,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        processor=processor_of(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
        versions=versions_of("torch", "diffusers"),
        dense_step=dense,
        pruned_step=patched,
        step_ratio=ratio,
        shapes=shapes,
        ways=ways,
    )


def _refuse_other_parts(config: PruningConfig) -> None:
    paper = PruningConfig()
    # With a tolerance the iterations depend on the tokens, and those here are random.
    for name in (
        "ranking",
        "head_fusion",
        "tolerance",
        "recovery",
        "similarity",
        "gradual",
        "refresh_every",
        "prune_less_factor",
    ):
        value = getattr(config, name)
        if value != getattr(paper, name):
            raise ValueError(f"only the parts of the paper's pruning are timed, and {name}={value!r} has others")


def _summary(arch: Architecture, config: PruningConfig, size: tuple[int, int]) -> PatchSummary:
    """Return what would be patched, at ``size`` in pixels."""
    latents = arch.latents(size)
    unet = arch.on_meta()
    with pruned(unet, config) as at_default:
        places = [shape.place for shape in at_default.shapes]
        return PatchSummary.of(unet, config, places, at_default.pruned, at_default.spared, latents)


@torch.no_grad()
def time_parts(
    unet: UNet2DConditionModel,
    shapes: Sequence[PrunedShape],
    config: PruningConfig,
    batch: int,
    repeats: int,
    progress: Progress | None = None,
) -> dict[str, WayLatency]:
    """Time the parts in one block of each shape, by every way in `WAYS` that memory allows.

    Args:
        unet: Where the projections are taken from, and dtype and device with them.
        shapes: From `pruned_shapes`.
        config: The pruning config.
        batch: B, images of guidance counted.
        repeats: Rounds after the one to warm up.
        progress: Told of every round.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = [
        torch.randn(batch, shape.tokens, shape.channels, generator=generator).to(unet.device, unet.dtype)
        for shape in shapes
    ]
    layers = [unet.get_submodule(shape.blocks[0]).transformer_blocks[0] for shape in shapes]
    skipped = {name: why_not(name, shapes, batch, unet.dtype, unet.device) for name in WAYS}
    rounds: dict[str, list[list[dict[str, float]]]] = {name: [] for name in WAYS if not skipped[name]}
    for done in range(repeats + 1):
        for name, times in rounds.items():
            times.append([])
            for shape, layer, at in zip(shapes, layers, tokens, strict=True):
                watch = Stopwatch(unet.device)
                prune_once(layer, at, shape.kept, config, name, watch.lap)
                times[-1].append(watch.read())
        if progress is not None:
            progress("parts", done + 1, repeats + 1)
    return {
        name: WayLatency({}, (), why) if why else _summed_up(shapes, rounds[name][1:]) for name, why in skipped.items()
    }


def _summed_up(shapes: Sequence[PrunedShape], rounds: Sequence[Sequence[dict[str, float]]]) -> WayLatency:
    """Take the median over the rounds of each part in each shape, and add up what a run has of them."""
    per_block = tuple(
        {part: median(times[index][part] for times in rounds) for part in PARTS} for index in range(len(shapes))
    )
    run = {
        part: sum(shape.times * block[part] for shape, block in zip(shapes, per_block, strict=True)) for part in PARTS
    }
    return WayLatency(run, per_block)


@torch.no_grad()
def time_steps(
    unet: UNet2DConditionModel,
    call: dict[str, Any],
    config: PruningConfig,
    repeats: int,
    progress: Progress | None = None,
) -> tuple[Spread, Spread, Spread]:
    """Time a whole call of the U-Net, dense and patched with no block spared, in turns; and give their ratio.

    Args:
        unet: Not patched; it is left so.
        call: Its arguments but for the timestep.
        config: The pruning config.
        repeats: Rounds after the one to warm up.
        progress: Told of every round.
    """
    normal = config.replace(schedule="constant")
    times: tuple[list[float], list[float]] = ([], [])
    for done in range(repeats + 1):
        for patched, of_kind in enumerate(times):
            with pruned(unet, normal) if patched else nullcontext():
                watch = Stopwatch(unet.device)
                unet(timestep=1, **call)
                watch.lap("step")
                of_kind.append(watch.read()["step"])
        if progress is not None:
            progress("steps", done + 1, repeats + 1)
    dense, with_patch = (of_kind[1:] for of_kind in times)
    ratios = [after / before for before, after in zip(dense, with_patch, strict=True)]
    return Spread.of(dense), Spread.of(with_patch), Spread.of(ratios)
