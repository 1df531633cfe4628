"""What lasts from one step of a run to the next, and when it is forgotten.

Only configs with ``refresh_every`` above 1 or own updates remember anything. A block remembers which tokens it chose
and what it added to each; the U-Net's state remembers which run that was. A run is known by the tensor of timesteps it
loops over, which is held on to, so that no other can take its place in memory. Choices serve the next steps of the same
run and no other, updates the very next one, if the block pruned in the last: a new image, a step back, a step left out,
a timestep that is not part of a list, or a step that comes twice (two images in turns, or the halves of guidance one
after another) find nothing, and all is chosen anew. Steps of one list that are of another image each look like a run
and cannot be told from one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from atedm.patching.steps import StepPosition, is_listed
from atedm.token_pruning import Choice, Updates


@dataclass
class BlockMemory:
    """What one block remembers. A copy, pickled or not, starts with nothing."""

    #: By layer, see `atedm.token_pruning.Choice`.
    choices: dict[int, Choice] = field(default_factory=dict)
    updates: Updates = field(default_factory=Updates)
    #: Whether this step goes by the choices.
    reuses: bool = False
    #: Whether the choices were made in the last step.
    is_new: bool = False
    #: Steps since they were made.
    age: int = 0

    def begin_step(self, follows: bool, refresh_every: int) -> None:
        """Forget, unless this step follows the last one; then say whether it goes by the choices made before."""
        if not follows:
            self.forget()
        if not self.updates.is_new:
            self.updates.last = None  # the block was spared in the last step, skipped by a cache, or broken off
        self.updates.is_new = False
        self.age = 1 if self.is_new else self.age + 1
        self.is_new = False
        self.reuses = bool(self.choices) and self.age < refresh_every

    def forget(self) -> None:
        """Drop all of it."""
        self.choices, self.updates, self.reuses, self.is_new = {}, Updates(), False, False

    def recall(self, counts: dict[int, int], batch: int, tokens: int) -> dict[int, Choice]:
        """Choices for blocks of that many images and tokens, of which so many are left by layer; empty if none fit."""
        if not self.reuses or self.choices.keys() != counts.keys():
            return {}
        first = self.choices[min(counts)]
        fits = first.importance.shape == (batch, tokens)
        fits = fits and all(self.choices[layer].keep.shape[1] == count for layer, count in counts.items())
        return self.choices if fits else {}

    def remember(self, choices: dict[int, Choice]) -> None:
        """Take the place of what was chosen before."""
        self.choices, self.is_new = choices, True

    def __getstate__(self) -> dict[str, Any]:
        return vars(BlockMemory())


@dataclass
class Run:
    """Which run the last step was of. A copy knows of none."""

    timestep: Tensor | None = None
    step: int = -1
    #: Whether a step of it came twice, so that one cannot tell which of the images that share it comes next.
    is_ambiguous: bool = False

    def follows(self, timestep: Any, position: StepPosition) -> bool:
        """Whether this step comes right after the last one, of the same run; remember it for the next."""
        if not isinstance(timestep, Tensor) or not is_listed(timestep) or timestep.device.type == "meta":
            self.timestep, self.step, self.is_ambiguous = None, -1, False
            return False
        same = self.timestep is not None and self._is_list_of(timestep)
        last = self.step
        self.timestep, self.step = timestep, position.step
        if not same or position.step < last:
            self.is_ambiguous = False
            return False
        self.is_ambiguous |= position.step == last
        return position.step == last + 1 and not self.is_ambiguous

    def _is_list_of(self, timestep: Tensor) -> bool:
        assert self.timestep is not None
        return self.timestep.untyped_storage().data_ptr() == timestep.untyped_storage().data_ptr()

    def __getstate__(self) -> dict[str, Any]:
        return vars(Run())
