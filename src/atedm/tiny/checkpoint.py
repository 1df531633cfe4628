"""What a training run is resumed from, in one safetensors file: weights, their averages, the optimizers' moments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atedm.files import written_whole

NAME = "state.safetensors"


def save_state(
    run: Path, model: nn.Module, average: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seen: int
) -> None:
    """Write the state of a run after ``seen`` images, whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        tensors |= moments_of(optimizer, f"optimizer{which}")
    tensors["seen"] = torch.tensor(seen)
    with written_whole(run / NAME) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)


def load_state(run: Path, model: nn.Module, average: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Go on from the state of a run, if it has one, and return how many images it has seen."""
    if not (run / NAME).exists():
        return 0
    tensors = load_file(run / NAME)
    model.load_state_dict(part_of(tensors, "model"))
    average.load_state_dict(part_of(tensors, "average"))
    for which, optimizer in enumerate(optimizers):
        load_moments(optimizer, tensors, f"optimizer{which}")
    return int(tensors["seen"])


def moments_of(optimizer: torch.optim.Optimizer, part: str) -> dict[str, Tensor]:
    """Return what an optimizer remembers as tensors of a part."""
    states = optimizer.state_dict()["state"].items()
    return {
        f"{part}.{number}.{what}": torch.as_tensor(value)
        for number, moments in states
        for what, value in moments.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], part: str) -> None:
    """Give an optimizer back what `moments_of` returned."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in part_of(tensors, part).items():
        number, _, what = name.partition(".")
        moments.setdefault(int(number), {})[what] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def averaged_weights(run: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a run by their names in its model, without what only its teacher is told."""
    weights = part_of(load_file(run / NAME), "average")
    return {name: value for name, value in weights.items() if not name.startswith("to_teacher.")}


def denoiser_of(weights: dict[str, Tensor]) -> str:
    """Say what a run trains, by the weights of its model: "unet" or "transformer"."""
    return "transformer" if any(name.startswith("transformer.") for name in weights) else "unet"


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of a part, without its name."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
