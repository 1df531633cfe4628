"""What `apply` did, in a form to print and to compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from atedm.config import PruningConfig
from atedm.costs.budget import solve_pruning_rate
from atedm.costs.formula import BlockShape, mean_macs, step_macs
from atedm.schedule import BlockPlace, prune_less_steps

WORDS = 77
"""Text tokens assumed in cost figures; the share they have is small."""


@dataclass(frozen=True)
class PatchSummary:
    """The attention blocks of a U-Net and what is done in each; ``print`` it for a table."""

    config: PruningConfig
    #: Every attention block of the model, at ``size``.
    shapes: tuple[BlockShape, ...]
    #: Names of the blocks that prune.
    pruned: frozenset[str]
    #: Names of the blocks that a prune-less step leaves alone.
    spared: frozenset[str]
    #: (height, width) of the latents the token counts are for.
    size: tuple[int, int]

    @classmethod
    def of(
        cls,
        unet: UNet2DConditionModel,
        config: PruningConfig,
        places: Sequence[BlockPlace],
        pruned: frozenset[str],
        spared: frozenset[str],
        size: tuple[int, int] | None = None,
    ) -> PatchSummary:
        """Describe a patch of ``unet`` at a latent size, by default the one it was trained for."""
        if size is None:
            default = unet.config.get("sample_size") or 64  # a ControlNet does not say
            size = (default, default) if isinstance(default, int) else tuple(default)
        shapes = tuple(block_shape(unet, place, size) for place in places)
        return cls(config, shapes, pruned, spared & pruned, size)

    @property
    def saving(self) -> float:
        """Share of the attention blocks' arithmetic that a normal step saves, net of what pruning adds."""
        return self._saving_of(self.config)

    @property
    def mean_saving(self) -> float:
        """Share of the attention blocks' arithmetic that a run of 50 steps saves."""
        return self.run_saving(50)

    def run_saving(self, steps: int) -> float:
        """Share of the attention blocks' arithmetic that a run of ``steps`` steps saves."""
        return 1 - self._mean(self.config, steps) / self._dense

    @property
    def prunable(self) -> float:
        """Share of the attention blocks' arithmetic that would go if all but one token were dropped."""
        gone = self.config.replace(pruning_rate=1 - 1e-9, gradual=(), level_factors=())
        return self._saving_of(gone)

    def _saving_of(self, config: PruningConfig) -> float:
        """Share saved by a normal step in which tokens are chosen."""
        return 1 - step_macs(self.shapes, config, self.pruned, prune_less=False).exact / self._dense

    def kept_share(self, steps: int) -> float:
        """Mean share of tokens in the pruned blocks after their last pruning layer, over a run and all blocks."""
        early = prune_less_steps(steps, self.config.schedule, self.config.prune_less_share) / steps
        shares = []
        for shape in self.shapes:
            if shape.place.name in self.pruned:
                normal, less = (self.kept(shape, prune_less=kind) / shape.tokens for kind in (False, True))
                less = 1.0 if shape.place.name in self.spared else less
                shares.append(early * less + (1 - early) * normal)
        return sum(shares) / len(shares)

    def kept(self, shape: BlockShape, *, prune_less: bool = False) -> int:
        """Tokens left at the end of a block in a normal step, or in a prune-less one that does not spare it."""
        return min(
            self.config.tokens_left(shape.place, shape.tokens, prune_less=prune_less).values(), default=shape.tokens
        )

    def at_equal_cost(self, config: PruningConfig, steps: int = 50) -> PruningConfig:
        """Return ``config`` with the pruning rate at which its run costs what this one's does.

        For comparing schedules: the mirrored one, say, prunes less in 35 of 50 steps and more in each.

        Raises:
            ValueError: If no rate reaches that cost.
        """
        pruned = frozenset(shape.place.name for shape in self.shapes if config.prunes(shape.place))
        return solve_pruning_rate(
            self.shapes, config, pruned, mean_macs(self.shapes, self.config, self.pruned, steps), steps
        )

    @property
    def _dense(self) -> float:
        return self._mean(self.config.replace(pruning_rate=0.0, gradual=()))

    def _mean(self, config: PruningConfig, steps: int = 50) -> float:
        return mean_macs(self.shapes, config, self.pruned, steps)

    def __str__(self) -> str:
        """Show one line a block, then what it comes to."""
        name = max(len(shape.place.name) for shape in self.shapes)
        lines = [f"{'attention block':<{name}}  level  layers  tokens    kept  spared"]
        when = {"prune-less-early": "early", "prune-more-early": "late"}.get(str(self.config.schedule), "at times")
        for shape in self.shapes:
            place = shape.place
            kept = f"{self.kept(shape):>6}" if place.name in self.pruned else "   all"
            spared = when if place.name in self.spared else ""
            line = f"{place.name:<{name}}  {place.level:>5}  {place.layers:>6}  {shape.tokens:>6}  {kept}  {spared}"
            lines.append(line.rstrip())
        height, width = self.size
        lines.append(
            f"{len(self.pruned)} of {len(self.shapes)} blocks prune. At {width} x {height} latents, of the attention "
            f"blocks' arithmetic {self.prunable:.0%} is prunable; a normal step saves {self.saving:.1%}, "
            f"a run of 50 steps {self.mean_saving:.1%}."
        )
        if self.config.own_functions:
            lines.append(f"What your own {' and '.join(self.config.own_functions)} takes is not counted.")
        if self.saving < 0:
            lines.append("What pruning adds (the attention map above all) costs more than it saves here.")
        return "\n".join(lines)


def block_shape(unet: UNet2DConditionModel, place: BlockPlace, size: tuple[int, int], words: int = WORDS) -> BlockShape:
    """Return the sizes of one attention block at (height, width) latents."""
    height, width = size
    for _ in range(place.level - 1):  # a downsampling convolution of stride 2 rounds up
        height, width = -(-height // 2), -(-width // 2)
    module = unet.get_submodule(place.name)
    layer = module.transformer_blocks[0]
    channels = layer.attn1.to_q.in_features
    return BlockShape(place, (height, width), channels, words, layer.attn2.to_k.in_features, layer.attn1.heads)
