"""Pruned transformers on a GPU, where there is one, give what they give on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

import atedm
from atedm.method.presets import TRANSFORMER_METHODS
from models import distance
from transformers_of import call_of, image_of, transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("method", ["matched", "paper"])
def test_a_pruned_transformer_gives_what_the_cpu_gives(name: str, method: str) -> None:
    model = transformer(name)
    calls = [call_of(name, noise=noise) for noise in (0.9, 0.6)]  # the first step is dense with matched pruning

    def seen(device: str) -> Tensor:
        model.to(device)
        with atedm.pruned(model, TRANSFORMER_METHODS[method]), torch.no_grad():
            return [image_of(model(**_moved(call, device))).cpu() for call in calls][-1]

    assert distance(seen(DEVICE), seen("cpu")) < 0.1


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(one, device) for one in value)
    return value
