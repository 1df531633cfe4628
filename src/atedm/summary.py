"""What `atedm.apply` did, in a form to print and to compute with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel

from atedm.costs.architectures import WORDS, Architecture, architecture
from atedm.costs.budget import Profile, profile_of
from atedm.costs.macs import SpanShape
from atedm.costs.spans import early_steps, span_shape
from atedm.hosts.models import find_model, is_transformer
from atedm.hosts.unet_spans import find_spans
from atedm.method.contract import Method

RUN_STEPS = 50
"""Steps of the run that figures are for, as the paper's are."""


@dataclass(frozen=True)
class PatchSummary:
    """The attention blocks of a U-Net, or the stretches of blocks of a transformer, and what is done in each.

    ``print`` it for a table. Figures are for the size the model was trained for.
    """

    method: Method
    #: Every span of the model that can be pruned.
    shapes: tuple[SpanShape, ...]
    #: Names of the blocks that are pruned.
    pruned: frozenset[str]
    #: The model, for what is only counted when it is asked for; None for a ControlNet.
    _architecture: Architecture | None = field(repr=False, compare=False)

    @classmethod
    def of(cls, target: Any, method: Method, pruned: frozenset[str]) -> PatchSummary:
        """Describe a pruned pipeline or model."""
        model = find_model(target)
        if is_transformer(model):
            arch = architecture(target)
            shapes = profile_of(arch).shapes
        elif isinstance(model, UNet2DConditionModel):
            arch = architecture(target)
            shapes = _shapes(model, arch.latents(), arch.words)
        else:
            arch, shapes = None, _shapes(model, (64, 64), WORDS)
        return cls(method, shapes, pruned, arch)

    def kept(self, shape: SpanShape, *, early: bool = False) -> int:
        """Tokens that the last layer of a block runs on."""
        return self.method.count(shape.place, shape.tokens, early=early)

    @property
    def spared(self) -> frozenset[str]:
        """Names of the pruned blocks that early steps leave alone."""
        return frozenset(
            shape.place.name for shape in self.shapes if self.kept(shape) < shape.tokens == self.kept(shape, early=True)
        )

    def kept_share(self, steps: int = RUN_STEPS) -> float:
        """Mean share of tokens left at the end of the pruned blocks, over a run."""
        early = early_steps(self.method, steps) / steps
        shares = [
            (early * self.kept(shape, early=True) + (1 - early) * self.kept(shape)) / shape.tokens
            for shape in self.shapes
            if shape.place.name in self.pruned
        ]
        return sum(shares) / len(shares) if shares else 1.0  # nothing is pruned, nothing dropped

    def cost(self, steps: int = RUN_STEPS) -> float:
        """Share of the dense model's MACs that a run takes, everything counted. Counts the model, once.

        Raises:
            TypeError: For a ControlNet, whose cost depends on the U-Net it steers.
        """
        profile = self._profile
        return profile.mean(self.method, steps) / profile.dense()

    @functools.cached_property
    def _profile(self) -> Profile:
        if self._architecture is None:
            raise TypeError("what a ControlNet costs depends on the U-Net that it steers, so it is not counted")
        return profile_of(self._architecture)

    def __str__(self) -> str:
        """Show one line a block, then what it comes to."""
        width = max(len(shape.place.name) for shape in self.shapes)
        of_transformer = self.shapes[0].place.is_stretch
        what = "blocks" if of_transformer else "attention block"
        lines = [f"{what:<{width}}  level  layers  tokens    kept  spared"]
        spared = self.spared
        for shape in self.shapes:
            place = shape.place
            kept = f"{self.kept(shape):>6}" if place.name in self.pruned else "   all"
            when = "early" if place.name in spared else ""
            line = f"{place.name:<{width}}  {place.level:>5}  {place.layers:>6}  {shape.tokens:>6}  {kept}  {when}"
            lines.append(line.rstrip())
        noun = "stretches of blocks" if of_transformer else "blocks"
        lines.append(f"{self.method.name}: {len(self.pruned)} of {len(self.shapes)} {noun} are pruned.")
        if self._architecture is not None:
            cost = self.cost()
            lines.append(f"A run of {RUN_STEPS} steps costs {cost:.1%} of the dense arithmetic.")
            if cost > 1:
                lines.append("What pruning adds (the attention map above all) costs more than it saves here.")
        return "\n".join(lines)


def _shapes(unet: Any, latents: tuple[int, int], words: int) -> tuple[SpanShape, ...]:
    return tuple(span_shape(unet, place, latents, words) for place, _ in find_spans(unet).values())
