# ruff: noqa: I001
"""The model that ships draws the same picture in ComfyUI as in diffusers, dense and pruned."""

import engine  # first: it skips these where there is no application, and brings it up where there is

from dataclasses import replace
from typing import Any

import pytest
import shipped
import torch

import atedm
from atedm.method.early_strength import EarlyStrength

CASES = {
    "dense": (None, None),
    "matched": ({"method": "matched", "rate": 0.6}, atedm.Matched(0.6)),
    "AT-EDM": ({"method": "AT-EDM", "rate": 0.63}, atedm.AtEdm()),
    "AT-EDM†": (
        {"method": "AT-EDM† (spares the second level)", "rate": 0.5},
        replace(atedm.METHODS["dagger"], rate=0.5),
    ),
    "gentle": (
        {"method": "matched", "rate": 0.6, "early_strength": 0.5},
        EarlyStrength(atedm.Matched(0.6), 0.5),
    ),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.set_num_threads(1)
    return shipped.bring()


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers(pipe: Any, case: str) -> None:
    node, method = CASES[case]
    found = shipped.picture(pipe, engine.Engine(), shipped.workflow(node))
    if method is None:
        expected = shipped.in_diffusers(pipe)
    else:
        with atedm.pruned(pipe, method):
            expected = shipped.in_diffusers(pipe)
    distance = 10 * torch.log10(1 / (found - expected).square().mean())
    print(f"{case}: {distance:.1f} dB")
    assert distance > 40
