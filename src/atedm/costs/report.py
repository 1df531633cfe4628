"""What one model costs at one size, dense and with one method: counted, and summed up in two conventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from atedm.costs.architectures import Architecture, architecture
from atedm.costs.counting import LATE, Counted, count_dense, count_macs, kinds_of_step
from atedm.costs.spans import CONVENTIONS, Macs, SpanShape, early_steps, span_macs, span_run_macs, span_shape
from atedm.costs.tome import ToMe, refuse_tome, tome_macs, tome_mean_macs, tome_step_macs
from atedm.costs.transformers import count_blocks, profile_transformer
from atedm.hosts.models import attach, detach, spans_of
from atedm.hosts.unet_spans import choose_spans, find_spans
from atedm.method.contract import Method
from atedm.method.presets import method_named
from atedm.suits import suits
from atedm.words import check_whole

TERA = 1e12


class Figures(NamedTuple):
    """MACs of one denoising step, in one convention."""

    dense: float
    normal_step: float
    early_step: float
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

    def as_dict(self) -> dict[str, float]:
        """Return plain JSON values: T MACs and shares."""
        return {
            **{name: _tera(value) for name, value in self._asdict().items()},
            "saving_normal": round(self.saving_normal, 6),
            "saving_mean": round(self.saving_mean, 6),
        }


@dataclass(frozen=True)
class SpanCost:
    """One attention block of a U-Net or one stretch of blocks of a transformer, for all images of one call."""

    shape: SpanShape
    #: Tokens that its last layer runs on in a normal step.
    kept: int
    #: Whether early steps leave it alone though normal ones prune it.
    spared: bool
    dense: Macs
    normal_step: Macs
    early_step: Macs
    #: All steps of the run together.
    run: Macs


@dataclass(frozen=True)
class StageCost:
    """MACs of one stage of a U-Net, or list of blocks of a transformer, outside of the spans, for all images."""

    name: str
    resnet: int
    #: Resampling; for "in and out" the first and last convolution and the embeddings of time and text.
    other: int


@dataclass(frozen=True)
class CostReport:
    """Arithmetic of one denoising step and of a run; see `cost`."""

    model: str
    method: Method | ToMe
    #: (width, height) in pixels.
    size: tuple[int, int]
    batch: int
    guidance: bool
    steps: int
    #: How many of the steps are early.
    early_steps: int
    spans: tuple[SpanCost, ...]
    stages: tuple[StageCost, ...]

    @property
    def rest(self) -> int:
        """MACs of a step outside the attention blocks: the same in both conventions, dense and pruned."""
        return sum(stage.resnet + stage.other for stage in self.stages)

    def figures(self, convention: str = "exact") -> Figures:
        """Sum a step up by one of `CONVENTIONS`."""
        dense, normal, early = (
            self.rest + sum(getattr(span, step).by(convention) for span in self.spans)
            for step in ("dense", "normal_step", "early_step")
        )
        mean = self.rest + sum(span.run.by(convention) for span in self.spans) / self.steps
        return Figures(dense, normal, early, mean)

    def with_tome(self, tome: ToMe, convention: str = "exact") -> Figures:
        """Figures of ToMe on the same model at the same size."""
        images = self.batch * (2 if self.guidance else 1)
        shapes = [span.shape for span in self.spans]
        normal, early = (
            self.rest + images * tome_step_macs(shapes, tome, early).by(convention) for early in (False, True)
        )
        if not tome.early_share:
            early = normal
        mean = self.rest + images * tome_mean_macs(shapes, tome, self.steps, convention)
        return Figures(self.figures(convention).dense, normal, early, mean)

    def overhead(self) -> int:
        """MACs that the method adds in a normal step."""
        return sum(span.normal_step.overhead for span in self.spans)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in T MACs."""
        return {
            "model": self.model,
            "method": {"method": "tome", **asdict(self.method)}
            if isinstance(self.method, ToMe)
            else self.method.as_dict(),
            "size": list(self.size),
            "batch": self.batch,
            "guidance": self.guidance,
            "steps": self.steps,
            "early_steps": self.early_steps,
            "unit": "TMAC",
            "convention": {name: self.figures(name).as_dict() for name in CONVENTIONS},
            "overhead_of_a_normal_step": _tera(self.overhead()),
            "stages": [
                {
                    "name": stage.name,
                    "resnet": _tera(stage.resnet),
                    "other": _tera(stage.other),
                    "attention": {name: _steps_as_dict(self.spans_of(stage.name), name) for name in CONVENTIONS},
                }
                for stage in self.stages
            ],
            "blocks": [
                {
                    **{name: getattr(span.shape.place, name) for name in ("name", "stage", "level", "layers")},
                    "tokens": span.shape.tokens,
                    "channels": span.shape.channels,
                    "kept": span.kept,
                    "spared": span.spared,
                    **{name: _steps_as_dict((span,), name) for name in CONVENTIONS},
                }
                for span in self.spans
            ],
        }

    def spans_of(self, stage: str) -> tuple[SpanCost, ...]:
        """Attention blocks of one stage."""
        return tuple(span for span in self.spans if span.shape.place.name.startswith((f"{stage}.", f"{stage}[")))


def cost(
    model: Any = "sdxl",
    method: Method | ToMe | str | None = None,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    steps: int | None = None,
) -> CostReport:
    """Say what a model saves at a size, without weights: it is built and counted on the meta device.

        >>> report = atedm.cost("sdxl", "paper")  # doctest: +SKIP
        >>> report.figures("paper").normal_step / 1e12  # doctest: +SKIP
        4.04883790848

    The exact figures of dense and pruned steps are what torch counts on the model itself, overheads included; those
    of ToMe are by formula.

    Args:
        model: As `atedm.costs.architectures.architecture`: "sdxl", "sd15", a folder, a hub id, a pipeline, a U-Net.
        method: A method, the name of one, or a `ToMe`; by default what suits the model.
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
    method = suits(arch.name).method if method is None else method
    method = method_named(method, transformer=arch.is_transformer) if isinstance(method, str) else method
    steps = suits(arch.name).steps if steps is None else steps
    guidance = arch.guidance if guidance is None else guidance
    check_whole("batch", batch)
    check_whole("steps", steps)
    images = batch * (2 if guidance else 1)
    size = size or arch.default_size
    model = arch.on_meta()
    shapes, stages = _counted(model, arch, size, images)
    refuse_tome(shapes, method)
    if isinstance(method, ToMe):
        early = sum(method.spare.is_early(step / steps) for step in range(steps))
        spans = tuple(_with_tome(shape, method, images, steps, early) for shape in shapes)
    else:
        choose_spans(spans_of(model), method)
        early = early_steps(method, steps)
        spans = tuple(_pruned(shape, method, images, steps) for shape in shapes)
    report = CostReport(arch.name, method, size, batch, guidance, steps, early, spans, stages)
    _check_against_torch(report, model, arch, images)
    return report


def _counted(
    model: Any, arch: Architecture, size: tuple[int, int], images: int
) -> tuple[Sequence[SpanShape], tuple[StageCost, ...]]:
    """Sizes of the spans of a dense model, and what else it costs."""
    if arch.is_transformer:
        counted = profile_transformer(model, arch.config, arch.grid(size), arch.words)
        return counted.shapes, tuple(StageCost(name, 0, macs * images) for name, macs in counted.rest.items())
    places = [place for place, _ in find_spans(model).values()]
    shapes = [span_shape(model, place, arch.latents(size), arch.words) for place in places]
    return shapes, _stages(count_dense(arch, size), images)


def _pruned(shape: SpanShape, method: Method, images: int, steps: int) -> SpanCost:
    dense, normal, early = (
        macs.times(images)
        for macs in (span_macs(shape), span_macs(shape, method), span_macs(shape, method, early=True))
    )
    kept = method.count(shape.place, shape.tokens)
    spared = kept < shape.tokens == method.count(shape.place, shape.tokens, early=True)
    return SpanCost(shape, kept, spared, dense, normal, early, span_run_macs(shape, method, steps).times(images))


def _with_tome(shape: SpanShape, tome: ToMe, images: int, steps: int, early: int) -> SpanCost:
    dense, merged = (macs.times(images) for macs in (span_macs(shape), tome_macs(shape, tome)))
    spared = tome.early_share > 0 and tome.spare.spares(shape.place)
    less = dense if spared else merged
    run = less.times(early).plus(merged.times(steps - early))
    return SpanCost(shape, shape.tokens - tome.merged(shape), spared, dense, merged, less, run)


def _stages(counted: Counted, images: int) -> tuple[StageCost, ...]:
    def attention(stage: str) -> int:
        return sum(macs for name, macs in counted.spans.items() if name.startswith(f"{stage}."))

    stages = [
        StageCost(name, counted.resnets[name] * images, (whole - counted.resnets[name] - attention(name)) * images)
        for name, whole in counted.stages.items()
    ]
    return (*stages, StageCost("in and out", 0, (counted.total - sum(counted.stages.values())) * images))


def _check_against_torch(report: CostReport, model: Any, arch: Architecture, images: int) -> None:
    """The figures are split up by formula, so the formula has to be what torch counts."""
    call = arch.call(report.size)

    def count(timestep: int) -> int:
        # Without values a transformer's step is a late one, whatever its timestep.
        total = count_blocks(model, call)[0] if arch.is_transformer else count_macs(model, call, timestep).total
        return total * images

    dense = count_blocks(model, call)[0] if arch.is_transformer else count_dense(arch, report.size).total
    found = {"dense": dense * images}
    if not isinstance(report.method, ToMe):
        kinds = {"normal_step": LATE} if arch.is_transformer else kinds_of_step(report.method)
        attach(model, report.method)
        try:
            found |= {kind: count(timestep) for kind, timestep in kinds.items()}
        finally:
            detach(model)
    for kind, counted in found.items():
        if (formula := getattr(report.figures(), kind)) != counted:
            raise ValueError(
                f"this model has parts not known here: by formula a {kind.replace('_', ' ')} takes {formula:.6g} MACs, "
                f"but torch counts {counted:.6g}"
            )


def _steps_as_dict(spans: tuple[SpanCost, ...], convention: str) -> dict[str, float]:
    return {
        step: _tera(sum(getattr(span, step).by(convention) for span in spans))
        for step in ("dense", "normal_step", "early_step")
    }


def _tera(macs: float) -> float:
    return round(macs / TERA, 6)
