"""Write down what a patched model prunes while it makes an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from atedm.patching.apply import observed
from atedm.patching.state import BlockObservation
from atedm.patching.survey import find_unet


@dataclass
class Recording:
    """The pruning layers that ran, in order, with tensors on the CPU and laid over the whole grid of their block."""

    observations: list[BlockObservation] = field(default_factory=list)
    #: Names of the blocks that may prune.
    blocks: tuple[str, ...] = ()
    #: For each call of the U-Net, the mean share of tokens left at the end of these blocks.
    kept_shares: list[float] = field(default_factory=list)

    @property
    def evaluations(self) -> int:
        """Times the U-Net was called."""
        return len(self.kept_shares)

    @property
    def kept_share(self) -> float:
        """Mean share of tokens left at the end of a block, over the pruned blocks and all calls of the U-Net."""
        if not self.kept_shares:
            raise ValueError("nothing was recorded: no image was made")
        return sum(self.kept_shares) / len(self.kept_shares)

    def end_call(self, since: int) -> None:
        """Sum up the call of the U-Net whose observations begin at index ``since``."""
        # A later pruning layer of the same block overwrites the earlier one; a spared block has none and keeps all.
        left = {seen.block: seen.keep.shape[1] / (seen.size[0] * seen.size[1]) for seen in self.observations[since:]}
        self.kept_shares.append(sum(left.get(block, 1.0) for block in self.blocks) / len(self.blocks))


def _on_the_grid(seen: BlockObservation, earlier: BlockObservation) -> BlockObservation:
    """Lay a later pruning layer of a block over the whole grid; tokens that never reached it have importance 0."""
    importance = torch.zeros_like(earlier.importance).scatter(1, earlier.keep, seen.importance)
    return seen._replace(importance=importance, keep=earlier.keep.gather(1, seen.keep))


@contextmanager
def recorded(target: Any) -> Iterator[Recording]:
    """Record one image of a patched pipeline or U-Net.

        with atedm.recorded(pipe) as recording:
            pipe("a red circle above a blue square")
        print(recording.kept_share)

    Raises:
        TypeError: If there is no U-Net.
        ValueError: If it is not patched.
    """
    unet = find_unet(target)
    recording = Recording()
    seen_before = 0

    def note(seen: BlockObservation) -> None:
        seen = seen._replace(importance=seen.importance.detach().float().cpu(), keep=seen.keep.detach().cpu())
        earlier = recording.observations[-1] if len(recording.observations) > seen_before else None
        if earlier is not None and earlier.block == seen.block:
            seen = _on_the_grid(seen, earlier)
        recording.observations.append(seen)

    def end_call(*_: Any) -> None:
        nonlocal seen_before
        recording.end_call(seen_before)
        seen_before = len(recording.observations)

    with observed(target, note):
        recording.blocks = unet._atedm.blocks
        hook = unet.register_forward_hook(end_call)
        try:
            yield recording
        finally:
            hook.remove()
