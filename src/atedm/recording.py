"""Write down what a patched model prunes while it makes an image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from atedm.patching.apply import observed
from atedm.patching.survey import find_unet
from atedm.patching.transformer import BlockObservation


@dataclass
class Recording:
    """The pruning layers that ran, in order, with tensors on the CPU."""

    observations: list[BlockObservation] = field(default_factory=list)
    #: Names of the blocks that may prune.
    blocks: tuple[str, ...] = ()
    #: Times the U-Net was called.
    evaluations: int = 0

    @property
    def kept_share(self) -> float:
        """Mean share of tokens left at the end of a block, over the pruned blocks and all calls of the U-Net."""
        if not self.evaluations or not self.blocks:
            raise ValueError("nothing was recorded: no image was made")
        left: dict[tuple[str, int], float] = {}
        for seen in self.observations:
            # A later pruning layer of the same block overwrites the earlier one.
            left[seen.block, seen.step] = seen.keep.shape[1] / (seen.size[0] * seen.size[1])
        calls = self.evaluations * len(self.blocks)
        return (sum(left.values()) + calls - len(left)) / calls


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

    def note(seen: BlockObservation) -> None:
        recording.observations.append(
            seen._replace(importance=seen.importance.detach().float().cpu(), keep=seen.keep.detach().cpu())
        )

    def count(*_: Any) -> None:
        recording.evaluations += 1

    with observed(target, note):
        recording.blocks = unet._atedm.blocks
        hook = unet.register_forward_hook(count)
        try:
            yield recording
        finally:
            hook.remove()
