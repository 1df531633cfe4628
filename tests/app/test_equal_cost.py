"""Rates by cost: budgets, and another method at the same cost."""

from __future__ import annotations

from typing import Any

import pytest

import atedm
from atedm.app.equal_cost import can_prune, method_at, request_cost, with_other_method, within_budget
from atedm.app.models import load_pipeline, native_size
from atedm.app.request import Request
from atedm.method.at_edm import DAGGER
from models import sdxl_pipeline, sdxl_unet


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


@pytest.mark.parametrize(
    ("method", "name", "other"),
    [
        ("dagger", None, "Matched pruning"),
        ("matched", "paper", "AT-EDM"),
        ("paper", "dagger", "AT-EDM†"),
        ("dagger", "paper", "AT-EDM"),
    ],
)
def test_another_method_is_shown_at_the_same_cost(pipe: Any, method: str, name: str | None, other: str) -> None:
    request = with_other_method(pipe, Request(("x",), atedm.METHODS[method], steps=10), name)
    assert request.other is not None
    assert request.other.name == other
    if (method, name) in (("matched", "paper"), ("paper", "dagger")):
        assert request.other == atedm.METHODS[name or ""]  # which does not get there
    else:
        assert request_cost(pipe, request, request.other) == pytest.approx(request_cost(pipe, request), abs=0.02)


def test_by_default_the_paper_stands_beside_ours_and_ours_beside_others(pipe: Any) -> None:
    for method, other in ((atedm.Matched(), atedm.AtEdm), (atedm.AtEdm(), atedm.Matched), (DAGGER, atedm.Matched)):
        assert isinstance(with_other_method(pipe, Request(("x",), method)).other, other)


def test_blocks_of_one_layer_are_pruned_by_ours_alone() -> None:
    pipe = sdxl_pipeline(sdxl_unet(transformer_layers_per_block=(1, 1, 1)))
    assert can_prune(pipe, atedm.Matched())
    assert not can_prune(pipe, atedm.AtEdm())
    request = Request(("x",), atedm.Matched(), steps=2)
    assert with_other_method(pipe, request) == request  # the paper's has nothing to show
    with pytest.raises(ValueError, match="nothing to prune"):
        with_other_method(pipe, request, "paper")


def test_a_budget_is_kept_at_the_size_of_the_model_or_of_the_request() -> None:
    pipe = sdxl_pipeline(unet=sdxl_unet(sample_size=(16, 24)))
    factor = pipe.vae_scale_factor
    assert native_size(pipe) == (24 * factor, 16 * factor)
    for size in ({}, {"width": 96, "height": 160}):
        found = within_budget(pipe, Request(("a",), atedm.Matched(), steps=4, **size), 0.7)
        assert 0.68 < request_cost(pipe, found) <= 0.7


def test_methods_by_name_and_rate() -> None:
    assert method_at("paper") == atedm.AtEdm()
    assert method_at("paper", 0.5) == atedm.AtEdm(rate=0.5)
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        method_at("papre")
