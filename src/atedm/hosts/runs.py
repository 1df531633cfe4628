"""Which step of which run a call of a model is, and what may be remembered from the call before.

Nothing is counted, so there is no counter to drift, and no image can leak into the next. Every pipeline loops over
``scheduler.timesteps``, and iterating over a tensor yields views of it: a view knows where in its storage it sits, and
asking that reads memory of the host only, wherever the tensor lives. Schedulers that evaluate the model several times a
step list each evaluation, and image-to-image hands out views of the end of the same list, so all of them stand where
they should.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class StepPosition(NamedTuple):
    """A step of a run: ``step`` counts from 0, ``share`` in [0, 1) is the share of the run done before it."""

    step: int
    share: float


def step_position(timestep: Tensor | float, train_timesteps: int = 1000) -> StepPosition:
    """Tell where in its run a denoising step stands.

    A timestep that is an element of a longer tensor stands where it sits in that tensor. Any other (a number, a tensor
    of its own, the only one of a run of one step) is judged by its value, ``train_timesteps`` being all noise; if it is
    a tensor of several, by the noisiest. Only that second way has to wait for the device the tensor is on. One element
    cut from a batch of unrelated timesteps, as in training, would be taken for a step of a run, and so would the steps
    of one list where each is of another image: hand over a copy of it.

    Args:
        timestep: What the model was handed.
        train_timesteps: Number of timesteps of the noise schedule the model was trained on.

    Raises:
        ValueError: If its value cannot be read, because it is one of many inside `torch.func.vmap`.
    """
    if isinstance(timestep, Tensor):
        if is_listed(timestep):
            step, steps = int(timestep.storage_offset()), _storage_length(timestep)
            return StepPosition(step, step / steps)
        try:
            timestep = float(timestep.max())
        except RuntimeError as error:
            raise ValueError(
                "the step cannot be read off a timestep that torch.func.vmap runs over; give the timestep as a number, "
                "or call atedm.remove first"
            ) from error
    done = (train_timesteps - 1 - float(timestep)) / train_timesteps
    share = min(max(done, 0.0), 1.0 - 1.0 / train_timesteps)
    return StepPosition(round(share * train_timesteps), share)


def is_listed(timestep: Tensor) -> bool:
    """Whether this is one element, perhaps expanded over the batch, of a longer one-dimensional tensor."""
    one = timestep.numel() == 1 or all(
        stride == 0 for stride, length in zip(timestep.stride(), timestep.shape, strict=True) if length > 1
    )
    return one and _storage_length(timestep) > 1


def _storage_length(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes() // tensor.element_size()
    except NotImplementedError:  # inside a transform of torch.func, where tensors have none
        return 1


@dataclass
class Run:
    """Which run the last step was of. A copy knows of none.

    A run is known by the tensor of timesteps it loops over, which is held on to, so that no other can take its place in
    memory. What is remembered serves the very next step of the same run. A new image, a step back, a step left out, a
    timestep that is not part of a list, or a step that comes twice (two images in turns, or the halves of guidance one
    after another) find nothing. Steps of one list that are of another image each look like a run.
    """

    timestep: Tensor | None = None
    step: int = -1
    #: Whether a step of it came twice, so that one cannot tell which of the images that share it comes next.
    is_ambiguous: bool = False
    #: Whether it goes from clean to noise, as inversion does.
    ascends: bool = False

    def locate(self, timestep: Any) -> tuple[StepPosition, bool]:
        """Tell where a step stands, and whether it comes right after the last one of the same run.

        The share that is done is counted from the noisy end, whichever way the run goes: early means noisy. That takes
        one look at the values of each new list of timesteps, for which the device is waited for once a run.

        Raises:
            ValueError: As `step_position`.
        """
        position = step_position(timestep)
        if not isinstance(timestep, Tensor) or not is_listed(timestep) or timestep.device.type == "meta":
            self.timestep, self.step, self.is_ambiguous = None, -1, False
            return position, False
        same = self.timestep is not None and _same_storage(self.timestep, timestep)
        last, self.step = self.step, position.step
        if not same:
            first, final = timestep.new_empty(0).set_(timestep.untyped_storage())[[0, -1]].tolist()
            self.timestep, self.ascends = timestep, first < final
        if self.ascends:
            steps = _storage_length(timestep)
            position = position._replace(share=(steps - 1 - position.step) / steps)
        if not same or position.step < last:
            self.is_ambiguous = False
            return position, False
        self.is_ambiguous |= position.step == last
        return position, position.step == last + 1 and not self.is_ambiguous

    def __getstate__(self) -> dict[str, Any]:
        return vars(Run())


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@dataclass
class Caller:
    """The thread that is in a call of a model: one at a time, because the step is told to the whole model.

    Hooks say when a call begins and ends. The end is told after an exception too, but not after an interrupt (Ctrl+C);
    then only the thread that was interrupted may go on with the model, or `atedm.remove` and `atedm.apply` reset it.
    """

    thread: int | None = None

    def begin(self) -> None:
        """Enter a call, or raise a `RuntimeError` if another thread is in one."""
        self.refuse_others()
        self.thread = threading.get_ident()

    def refuse_others(self) -> None:
        """Raise a `RuntimeError` if another thread is in a call."""
        busy = self.thread not in (None, threading.get_ident())
        if busy and any(thread.ident == self.thread for thread in threading.enumerate()):
            raise RuntimeError(
                "this patched model is in the middle of a step in another thread; call it from one thread at a time, "
                "or give each its own: copy.deepcopy(pipe.unet), before or after atedm.apply"
            )

    @property
    def is_this_thread(self) -> bool:
        """Whether the call is this thread's. Hooks tell the end of a refused call too."""
        return self.thread == threading.get_ident()

    def end(self) -> None:
        """Leave the call, if it is this thread's."""
        if self.is_this_thread:
            self.thread = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(Caller())
