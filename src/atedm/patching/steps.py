"""Where a denoising step stands in its run, told by the timestep the U-Net is handed.

Nothing is counted and nothing remembered, so there is no counter to drift, and no image can leak into the next. Every
pipeline loops over ``scheduler.timesteps``, and iterating over a tensor yields views of it: a view knows where in its
storage it sits, and asking that reads memory of the host only, wherever the tensor lives. Schedulers that evaluate the
model several times a step list each evaluation, and image-to-image hands out views of the end of the same list, so all
of them stand where they should.
"""

from __future__ import annotations

from typing import NamedTuple

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
        timestep: What the U-Net was handed.
        train_timesteps: Number of timesteps of the noise schedule the model was trained on.

    Returns:
        The `StepPosition`.
    """
    if isinstance(timestep, Tensor):
        if is_listed(timestep):
            step, steps = int(timestep.storage_offset()), _storage_length(timestep)
            return StepPosition(step, step / steps)
        timestep = float(timestep.max())
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
    return tensor.untyped_storage().nbytes() // tensor.element_size()
