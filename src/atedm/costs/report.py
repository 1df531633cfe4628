"""What one model costs at one size, dense and with one method: counted, and summed up in two conventions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from atedm.costs.architectures import Architecture, architecture
from atedm.costs.budget import Profile, profile_of
from atedm.costs.counting import StageCost, count_macs, kinds_of_step
from atedm.costs.macs import CONVENTIONS, Macs, SpanShape
from atedm.costs.spans import early_steps, span_macs, span_run_macs
from atedm.costs.tome import ToMe
from atedm.costs.transformers import count_blocks
from atedm.hosts.models import attach, detach, spans_of
from atedm.hosts.unet_spans import choose_spans
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
        spans = tuple(_span_cost(span.shape, tome, images, self.steps) for span in self.spans)
        return replace(self, method=tome, spans=spans).figures(convention)

    def overhead(self) -> int:
        """MACs that the method adds in a normal step."""
        return sum(span.normal_step.overhead for span in self.spans)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, in T MACs."""
        return {
            "model": self.model,
            "method": self.method.as_dict(),
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
    if not isinstance(method, ToMe):
        choose_spans(spans_of(model), method)
    profile = profile_of(arch, size)
    spans = tuple(_span_cost(shape, method, images, steps) for shape in profile.shapes)
    stages = tuple(StageCost(name, resnet * images, other * images) for name, resnet, other in profile.stages)
    report = CostReport(arch.name, method, size, batch, guidance, steps, early_steps(method, steps), spans, stages)
    _check_against_torch(report, profile, model, arch, images)
    return report


def _span_cost(shape: SpanShape, method: Method | ToMe, images: int, steps: int) -> SpanCost:
    def kept(*, early: bool) -> int:
        if isinstance(method, ToMe):
            return method.kept(shape, early=early)
        return method.count(shape.place, shape.tokens, early=early)

    return SpanCost(
        shape,
        kept(early=False),
        kept(early=False) < shape.tokens == kept(early=True),
        span_macs(shape).times(images),
        span_macs(shape, method).times(images),
        span_macs(shape, method, early=True).times(images),
        span_run_macs(shape, method, steps).times(images),
    )


def _check_against_torch(report: CostReport, profile: Profile, model: Any, arch: Architecture, images: int) -> None:
    """The figures are split up by formula, so the formula has to be what torch counts."""
    call, found = arch.call(report.size), {"dense": profile.total}
    if not isinstance(report.method, ToMe):
        attach(model, report.method)
        try:
            if arch.is_transformer:  # without values its step is a late one, whatever the timestep
                found["normal_step"] = count_blocks(model, call)[0]
            else:
                kinds = kinds_of_step(report.method)
                found |= {kind: count_macs(model, call, timestep).total for kind, timestep in kinds.items()}
        finally:
            detach(model)
    for kind, counted in found.items():
        if (formula := getattr(report.figures(), kind)) != images * counted:
            raise ValueError(
                f"this model has parts not known here: by formula a {kind.replace('_', ' ')} takes {formula:.6g} MACs, "
                f"but torch counts {images * counted:.6g}"
            )


def _steps_as_dict(spans: tuple[SpanCost, ...], convention: str) -> dict[str, float]:
    return {
        step: _tera(sum(getattr(span, step).by(convention) for span in spans))
        for step in ("dense", "normal_step", "early_step")
    }


def _tera(macs: float) -> float:
    return round(macs / TERA, 6)
