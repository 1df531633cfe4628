"""Sharing work among the processes that `accelerate launch` or `torchrun` started."""

import os

import torch
from accelerate import PartialState

from atedm.app.devices import best_device


def shared_work(device: str | None = None) -> PartialState:
    """Return this process' place among those that share the work: alone, unless a launcher started several.

    `accelerate` shares work among CPU processes only if it is told that the CPU is meant. Otherwise each process takes
    itself for the only one and does everything. Raises a `ValueError` if a launcher started several processes that do
    not see each other.
    """
    state = PartialState(cpu=torch.device(device or best_device()).type == "cpu")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched but accelerate sees {state.num_processes}, so each would do all the "
            "work; make no PartialState or Accelerator before, or make it with cpu=True on a machine without GPU"
        )
    return state
