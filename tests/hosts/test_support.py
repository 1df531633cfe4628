"""Every line of docs/reference/support.md holds."""

import pytest
import torch

import atedm
from models import distance
from support import CASES, HAS_TRANSFORMERS, PAGE, Case, table


@pytest.mark.parametrize(
    ("case", "method"),
    [pytest.param(case, method, id=f"{case.name}: {method}") for case in CASES for method in case.methods],
)
def test_it_is_pruned_drawn_again_and_left_as_it_was(case: Case, method: str) -> None:
    pipe, draw = case.make()
    model = getattr(pipe, case.part)
    dense = draw()
    seen: list[atedm.Observation] = []
    summary = atedm.apply(model, method)
    with atedm.observed(model, seen.append):
        pruned = draw()
    assert {one.block for one in seen} == summary.pruned
    assert torch.isfinite(pruned).all()
    assert distance(pruned, dense) > 0.01
    assert torch.equal(draw(), pruned)
    atedm.remove(model)
    assert torch.equal(draw(), dense)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="the page is of a diffusers that has the transformers")
def test_the_page_is_what_is_tested() -> None:
    assert PAGE.read_text() == table(), "PYTHONPATH=tests .venv/bin/python tests/support.py"
