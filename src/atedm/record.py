"""Write down what a patched model prunes while it makes an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from atedm.hosts.models import find_model
from atedm.hosts.state import Observation
from atedm.patch import observed


@dataclass
class Recording:
    """The cuts that ran, in order, with tensors on the CPU and laid over the whole grid of their block."""

    observations: list[Observation] = field(default_factory=list)
    #: Names of the blocks that may prune.
    blocks: tuple[str, ...] = ()
    #: For each call of the U-Net, the mean share of tokens left at the end of these blocks.
    kept_shares: list[float] = field(default_factory=list)
    #: How many observations are of calls that came to their end.
    _ended: int = 0

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

    def begin_call(self) -> None:
        """Forget what a call of the U-Net that was broken off has left."""
        del self.observations[self._ended :]

    def note(self, seen: Observation) -> None:
        """Take in one cut."""
        seen = seen._replace(importance=seen.importance.detach().float().cpu(), keep=seen.keep.detach().cpu())
        earlier = self.observations[-1] if len(self.observations) > self._ended else None
        if earlier is not None and earlier.block == seen.block:
            seen = _on_the_grid(seen, earlier)
        self.observations.append(seen)

    def end_call(self) -> None:
        """Sum up a call of the U-Net."""
        # A later pruning layer of the same block overwrites the earlier one; a spared block has none and keeps all.
        new = self.observations[self._ended :]
        left = {seen.block: seen.keep.shape[1] / (seen.size[0] * seen.size[1]) for seen in new}
        self.kept_shares.append(sum(left.get(block, 1.0) for block in self.blocks) / len(self.blocks))
        self._ended = len(self.observations)


def _on_the_grid(seen: Observation, earlier: Observation) -> Observation:
    """Lay a later pruning layer of a block over the whole grid; tokens that never reached it have importance 0."""
    importance = torch.zeros_like(earlier.importance).scatter(1, earlier.keep, seen.importance)
    return seen._replace(importance=importance, keep=earlier.keep.gather(1, seen.keep))


@contextmanager
def recorded(target: Any) -> Iterator[Recording]:
    """Record one image of a patched pipeline or U-Net.

        with atedm.recorded(pipe) as recording:
            pipe("a butterfly above a rose")
        print(recording.kept_share)

    Raises:
        TypeError: If there is no U-Net.
        ValueError: If it is not patched.
    """
    model = find_model(target)
    recording = Recording()
    with observed(target, recording.note):
        recording.blocks = model._atedm.spans
        hooks = (
            model.register_forward_pre_hook(_Hook(recording.begin_call)),
            model.register_forward_hook(_Hook(recording.end_call)),
        )
        try:
            yield recording
        finally:
            for hook in hooks:
                hook.remove()


class _Hook:
    """A hook of a module that does nothing in copies of it, pickled or not: they are not recorded."""

    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self.act = act

    def __call__(self, *_: Any) -> None:
        if self.act is not None:
            self.act()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
