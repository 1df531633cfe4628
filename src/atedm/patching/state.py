"""What a patched U-Net and its blocks know."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atedm.config import PruningConfig
from atedm.patching.memory import BlockMemory, Run
from atedm.schedule import BlockPlace


class BlockObservation(NamedTuple):
    """What an observer is told of one pruning layer: see `atedm.observed`."""

    #: Name of the block in the U-Net.
    block: str
    #: Layer in the block, counted from 0.
    layer: int
    #: Index of the denoising step.
    step: int
    #: (B, N) float32, of the tokens that reach the layer: the whole grid, unless an earlier layer dropped some.
    importance: Tensor
    #: (B, K) int64, ascending: places among those N.
    keep: Tensor
    #: (h, w) of the block's grid.
    size: tuple[int, int]


@dataclass
class UNetState:
    """What the blocks of one patched U-Net share. The step is set before each call of the U-Net; only ``run`` lasts."""

    config: PruningConfig
    #: Names of the patched blocks.
    blocks: tuple[str, ...]
    prune_less: bool = False
    #: Index of the denoising step. A tensor of the host, because `torch.compile` takes an int here for a constant.
    step: Tensor = field(default_factory=partial(torch.tensor, 0, device="cpu"))
    observers: list[Any] = field(default_factory=list)
    #: What is never dropped, (H, W) of zeros and ones over the image.
    protect: Tensor | None = None
    #: Sizes of latents, (height, width), for which that was found to leave room.
    roomy: set[tuple[int, int]] = field(default_factory=set)
    #: For configs that remember.
    run: Run = field(default_factory=Run)
    #: The thread of the last call, see `atedm.patching.threads`.
    caller: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a U-Net, pickled or not, are not observed, as they remember nothing.
        return vars(self) | {"observers": []}


@dataclass
class BlockPatch:
    """What one patched block knows."""

    place: BlockPlace
    state: UNetState
    #: Whether the block is left alone in prune-less steps.
    spared: bool
    memory: BlockMemory = field(default_factory=BlockMemory)

    def counts(self, tokens: int) -> dict[int, int]:
        """Tokens left after each pruning layer of this block in this step, by layer; empty for a dense step."""
        if self.spared and self.state.prune_less:
            return {}
        return self.state.config.tokens_left(self.place, tokens, prune_less=self.state.prune_less)
