"""Every line of docs/support.md holds."""

import pytest
import torch

import atedm
from atedm.config import PruningConfig
from models import distance
from support import CASES, PAGE, Case, table


@pytest.mark.parametrize(
    ("case", "config"),
    [
        pytest.param(case, config, id=f"{case.name}: {preset}")
        for case in CASES
        for preset, config in case.presets.items()
    ],
)
def test_it_is_pruned_drawn_again_and_left_as_it_was(case: Case, config: PruningConfig) -> None:
    pipe, draw = case.make()
    model = getattr(pipe, case.part)
    dense = draw()
    seen: list[atedm.BlockObservation] = []
    summary = atedm.apply(model, config)
    with atedm.observed(model, seen.append):
        pruned = draw()
    assert {one.block for one in seen} == summary.pruned
    assert torch.isfinite(pruned).all()
    assert distance(pruned, dense) > 0.01
    assert torch.equal(draw(), pruned)
    atedm.remove(model)
    assert torch.equal(draw(), dense)


def test_the_page_is_what_is_tested() -> None:
    assert PAGE.read_text() == table(), "PYTHONPATH=tests .venv/bin/python tests/support.py"
