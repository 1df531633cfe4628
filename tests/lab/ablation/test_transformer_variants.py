"""Variants in a transformer: what they share with the methods, what they cost, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import atedm
from atedm import AtEdm, Matched
from atedm.costs.architectures import architecture
from atedm.costs.flops import flop_counter
from atedm.costs.report import cost
from atedm.lab.ablation import Variant, variant_of
from atedm.lab.methods.by_name import method_by_name
from transformers_of import transformer

SD3 = "SD3Transformer2DModel"


def outputs(model: Any, method: Any) -> Tensor:
    """Two steps of a run."""
    call = architecture(model).call((128, 128), 2, device="cpu")
    with torch.no_grad(), atedm.pruned(model, method):
        return torch.stack([model(**call | {"timestep": torch.full((2,), float(time))})[0] for time in (900, 600)])


@pytest.mark.parametrize("method", [AtEdm(rate=0.5), Matched(rate=0.5)], ids=["at-edm", "matched"])
def test_a_variant_does_what_the_method_does(method: Any) -> None:
    model = transformer(SD3)
    same = outputs(model, variant_of(method))
    assert torch.equal(same, outputs(model, method))
    assert not torch.equal(same, outputs(model, replace(variant_of(method), rate=0.6)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"match": "cosine", "rank": "uniform-random"},
        {"refill": "matched-update"},
        {"place": "before-self-attention"},
    ],
)
def test_the_formula_is_what_torch_counts(change: dict[str, Any]) -> None:
    change = {"match": "euclidean", "rank": "lattice"} | change if "place" in change else change
    model, variant = transformer(SD3), Variant(rate=0.5, **change)
    call = architecture(model).call((128, 128), device="cpu")
    with torch.no_grad(), atedm.pruned(model, variant), flop_counter() as counted, sdpa_kernel(SDPBackend.MATH):
        model(**call)
    assert counted.get_total_flops() // 2 == cost(model, variant, size=(128, 128), guidance=False).figures().normal_step


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("paper[place=before-feed-forward]", "inside a layer"),
        ("paper[rank=cross-attention-entropy]", "reads cross-attention"),
        ("paper[gradual=[[0,0.4],[1,0.4]]]", "drops once"),
        ("dagger[refresh_every=2]", "anew in every step"),
        ("matched[match=cosine]", "no dense steps at first"),
    ],
)
def test_what_a_transformer_cannot_do_is_refused(spec: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        method_by_name(spec, "sd35-medium")
    method_by_name(spec, "sdxl")
