"""What one model costs at one size, dense and with one way of pruning: counted, and summed up in two conventions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import atedm
from atedm.config import PruningConfig, preset
from atedm.costs.architectures import architecture
from atedm.costs.counting import LATE, Counted, count_macs, kinds_of_step
from atedm.costs.formula import CONVENTIONS, BlockShape, Macs, at_most, block_macs, block_run_macs
from atedm.costs.tome import ToMe, tome_macs, tome_mean_macs, tome_step_macs
from atedm.patching.apply import pruned
from atedm.patching.summary import block_shape
from atedm.patching.survey import choose_blocks, find_blocks
from atedm.pipelines import habits
from atedm.schedule import prune_less_blocks, prune_less_steps

TERA = 1e12


class Figures(NamedTuple):
    """MACs of one denoising step, in one convention."""

    dense: float
    normal_step: float
    prune_less_step: float
    #: Over the run.
    mean: float

    @property
    def saving_normal(self) -> float:
        """Share of the dense step that a normal step saves."""
        return 1 - self.normal_step / self.dense

    @property
    def saving_mean(self) -> float:
        """Share of the dense run that the run saves."""
        return 1 - self.mean / self.dense


@dataclass(frozen=True)
class BlockCost:
    """One attention block, for all images of one U-Net call."""

    shape: BlockShape
    #: Tokens that its last layer runs on in a normal step.
    kept: int
    #: Whether prune-less steps leave it alone.
    spared: bool
    dense: Macs
    normal_step: Macs
    prune_less_step: Macs
    #: All steps of the run together.
    run: Macs


@dataclass(frozen=True)
class StageCost:
    """MACs of one stage of the U-Net outside its attention blocks, for all images of one call."""

    name: str
    resnet: int
    #: Resampling; for "in and out" the first and last convolution and the embeddings of time and text.
    other: int


@dataclass(frozen=True)
class CostReport:
    """Arithmetic of one denoising step and of a run; see `cost`."""

    model: str
    method: PruningConfig | ToMe
    #: (width, height) in pixels.
    size: tuple[int, int]
    batch: int
    guidance: bool
    steps: int
    #: How many of the steps are prune-less.
    prune_less_steps: int
    blocks: tuple[BlockCost, ...]
    stages: tuple[StageCost, ...]

    @property
    def rest(self) -> int:
        """MACs of a step outside the attention blocks: the same in both conventions, dense and pruned."""
        return sum(stage.resnet + stage.other for stage in self.stages)

    def figures(self, convention: str = "exact") -> Figures:
        """Sum a step up by one of `CONVENTIONS`."""
        dense, normal, less = (
            self.rest + sum(getattr(block, step).by(convention) for block in self.blocks)
            for step in ("dense", "normal_step", "prune_less_step")
        )
        mean = self.rest + sum(block.run.by(convention) for block in self.blocks) / self.steps
        return Figures(dense, normal, less, mean)

    def with_tome(self, tome: ToMe, convention: str = "exact") -> Figures:
        """Figures of ToMe on the same model at the same size."""
        images = self.batch * (2 if self.guidance else 1)
        shapes = [block.shape for block in self.blocks]
        normal, less = (
            self.rest + images * tome_step_macs(shapes, tome, prune_less).by(convention) for prune_less in (False, True)
        )
        if not tome.prune_less_share:
            less = normal
        mean = self.rest + images * tome_mean_macs(shapes, tome, self.steps, convention)
        return Figures(self.figures(convention).dense, normal, less, mean)

    def overhead(self) -> Macs:
        """Of a normal step; its ``exact`` figures hold the map, the ranking and the matching."""
        return Macs().plus(*(block.normal_step for block in self.blocks))

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in T MACs."""
        overhead = self.overhead()
        return {
            "atedm": atedm.__version__,
            "model": self.model,
            "method": "at-edm" if isinstance(self.method, PruningConfig) else "tome",
            "config": self.method.as_dict() if isinstance(self.method, PruningConfig) else asdict(self.method),
            "size": list(self.size),
            "batch": self.batch,
            "guidance": self.guidance,
            "steps": self.steps,
            "prune_less_steps": self.prune_less_steps,
            "unit": "TMAC",
            "convention": {name: figures_as_dict(self.figures(name)) for name in CONVENTIONS},
            "overhead_of_a_normal_step": {
                part: _tera(getattr(overhead, part)) for part in ("map", "ranking", "matching")
            },
            "stages": [
                {
                    "name": stage.name,
                    "resnet": _tera(stage.resnet),
                    "other": _tera(stage.other),
                    "attention": {
                        name: _steps_as_dict(_blocks_of(self.blocks, stage.name), name) for name in CONVENTIONS
                    },
                }
                for stage in self.stages
            ],
            "blocks": [
                {
                    "name": block.shape.place.name,
                    "stage": block.shape.place.stage,
                    "level": block.shape.place.level,
                    "layers": block.shape.place.layers,
                    "tokens": block.shape.tokens,
                    "channels": block.shape.channels,
                    "kept": block.kept,
                    "spared": block.spared,
                    **{name: _steps_as_dict((block,), name) for name in CONVENTIONS},
                }
                for block in self.blocks
            ],
        }


def cost(
    model: Any = "sdxl",
    method: PruningConfig | ToMe | str | None = None,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    steps: int | None = None,
) -> CostReport:
    """Say what a model saves at a size, without weights: the U-Net is built and counted on the meta device.

        >>> report = atedm.cost("sdxl", "paper")  # doctest: +SKIP
        >>> report.figures("paper").normal_step / 1e12  # doctest: +SKIP
        4.04883790848

    The exact figures of dense and pruned steps are what torch counts on the model itself, overheads included; those
    of ToMe are by formula.

    Args:
        model: As `atedm.costs.architectures.architecture`: "sdxl", "sd15", a folder, a hub id, a pipeline, a U-Net.
        method: A `PruningConfig`, the name of a preset, or a `ToMe`; by default what suits
            the model, see `suiting`.
        size: (width, height) in pixels; by default what the model was trained for.
        batch: Images made at once.
        guidance: Whether each image takes two halves of a U-Net call; by default what suits the model.
        steps: Steps of the run; by default what suits the model.

    Raises:
        FileNotFoundError: If a local folder is not there.
        TypeError: If there is no U-Net.
        ValueError: If the model is unknown, the size does not divide, or there is nothing to prune.
    """
    arch = architecture(model)
    method = suiting(model) if method is None else method
    method = preset(method) if isinstance(method, str) else method
    if isinstance(method, PruningConfig) and method.own_functions:
        raise ValueError(
            f"costs are split by formula, and none says what your own {' and '.join(method.own_functions)} takes; "
            f"atedm bench and atedm evaluate count it as torch does"
        )
    steps = habits(arch.name).steps if steps is None else steps
    guidance = arch.guidance if guidance is None else guidance
    for name, value in (("batch", batch), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    images = batch * (2 if guidance else 1)
    size = size or arch.default_size
    latents = arch.latents(size)
    unet = arch.on_meta()
    shapes = [block_shape(unet, place, latents, arch.words) for place, _ in find_blocks(unet).values()]
    if isinstance(method, PruningConfig):
        chosen = frozenset(choose_blocks(find_blocks(unet), method))
        spared = method.spared(shape.place for shape in shapes)
        blocks = tuple(_pruned_block(shape, method, chosen, spared, images, steps) for shape in shapes)
        early = prune_less_steps(steps, method.schedule, method.prune_less_share)
    else:
        at_all = prune_less_blocks((shape.place for shape in shapes), method.unpruned_blocks)
        spared = at_all if method.prune_less_share else frozenset()
        early = prune_less_steps(steps, "prune-less-early", method.prune_less_share)
        blocks = tuple(_tome_block(shape, method, spared, images, steps, early) for shape in shapes)
    call = arch.call(size)
    dense = count_macs(unet, call, LATE)
    report = CostReport(arch.name, method, size, batch, guidance, steps, early, blocks, _stages(dense, images))
    _check(report.figures().dense, dense.total * images, "dense")
    if isinstance(method, PruningConfig):
        for kind, timestep in kinds_of_step(method.schedule, method.prune_less_share).items():
            with pruned(unet, at_most(method)):
                counted = count_macs(unet, call, timestep)
            _check(getattr(report.figures(), kind), counted.total * images, kind)
    return report


def suiting(model: Any) -> PruningConfig:
    """Return the preset that suits a model.

    Where no attention block has a second layer, as in SD 1.x and 2.x, tokens are dropped after self-attention, because
    the paper's place would save nothing.

    Raises:
        FileNotFoundError: As `cost`.
        TypeError: As `cost`.
        ValueError: As `cost`.
    """
    arch = architecture(model)
    config = preset(habits(arch.name).preset)
    one_layer = all(place.layers == 1 for place, _ in find_blocks(arch.on_meta()).values())
    return config.replace(place="after-self-attention") if one_layer else config


def _pruned_block(
    shape: BlockShape, config: PruningConfig, chosen: frozenset[str], spared: frozenset[str], images: int, steps: int
) -> BlockCost:
    name = shape.place.name
    dense = block_macs(shape).times(images)
    if name not in chosen:
        return BlockCost(shape, shape.tokens, False, dense, dense, dense, dense.times(steps))
    kept = min(config.tokens_left(shape.place, shape.tokens).values(), default=shape.tokens)
    normal = block_macs(shape, config).times(images)
    less = dense if name in spared else block_macs(shape, config, prune_less=True).times(images)
    run = block_run_macs(shape, config, name in spared, steps).times(images)
    return BlockCost(shape, kept, name in spared, dense, normal, less, run)


def _tome_block(
    shape: BlockShape, tome: ToMe, spared: frozenset[str], images: int, steps: int, early: int
) -> BlockCost:
    dense, merged = (macs.times(images) for macs in (block_macs(shape), tome_macs(shape, tome)))
    is_spared = shape.place.name in spared
    kept = shape.tokens - tome.merged(shape)
    less = dense if is_spared else merged
    run = less.times(early).plus(merged.times(steps - early))
    return BlockCost(shape, kept, is_spared, dense, merged, less, run)


def _stages(counted: Counted, images: int) -> tuple[StageCost, ...]:
    def attention(stage: str) -> int:
        return sum(macs for name, macs in counted.blocks.items() if name.startswith(f"{stage}."))

    stages = [
        StageCost(name, counted.resnets[name] * images, (whole - counted.resnets[name] - attention(name)) * images)
        for name, whole in counted.stages.items()
    ]
    return (*stages, StageCost("in and out", 0, (counted.total - sum(counted.stages.values())) * images))


def _check(formula: float, counted: int, what: str) -> None:
    """The figures are split up by formula, so the formula has to be what torch counts."""
    if formula != counted:
        raise ValueError(
            f"this U-Net has parts not known here: by formula a {what.replace('_', ' ')} takes {formula:.6g} MACs, "
            f"but torch counts {counted:.6g}"
        )


def _blocks_of(blocks: tuple[BlockCost, ...], stage: str) -> tuple[BlockCost, ...]:
    return tuple(block for block in blocks if block.shape.place.name.startswith(f"{stage}."))


def _steps_as_dict(blocks: tuple[BlockCost, ...], convention: str) -> dict[str, float]:
    return {
        step: _tera(sum(getattr(block, step).by(convention) for block in blocks))
        for step in ("dense", "normal_step", "prune_less_step")
    }


def figures_as_dict(figures: Figures) -> dict[str, float]:
    """Return plain JSON values: T MACs and shares."""
    return {
        **{name: _tera(value) for name, value in figures._asdict().items()},
        "saving_normal": round(figures.saving_normal, 6),
        "saving_mean": round(figures.saving_mean, 6),
    }


def _tera(macs: float) -> float:
    return round(macs / TERA, 6)
