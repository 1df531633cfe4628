"""What transformers cost: by formula what torch counts, dense and pruned."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import atedm
from atedm import AtEdm, Matched
from atedm.costs.architectures import architecture
from atedm.costs.budget import CostOutOfReach, fit_to_budget, profile_of, run_cost
from atedm.costs.flops import flop_counter
from atedm.costs.report import cost
from atedm.method.matched import FIRST_STEP
from atedm.method.presets import TRANSFORMER_METHODS
from transformers_of import CONFIGS, transformer

NAMES = ("flux", "sd35-large", "sd35-medium", "qwen-image", "z-image", "pixart-sigma")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", [Matched(rate=0.6, dense_share=0.5), AtEdm(rate=0.5)], ids=["matched", "at-edm"])
def test_the_formula_is_what_torch_counts(name: str, method: object) -> None:
    report = cost(transformer(name), method, steps=4)  # raises where torch counts anything else
    figures = report.figures()
    assert figures.normal_step < figures.dense
    assert report.early_steps == 2
    if isinstance(method, Matched):
        assert figures.early_step == figures.dense
        assert figures.mean == (figures.dense + figures.normal_step) / 2
    assert sum(span.dense.exact for span in report.spans) + report.rest == figures.dense


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel"])
def test_a_call_with_values_costs_the_same(name: str) -> None:
    model = transformer(name)
    arch = architecture(model)
    size = (128, 96)
    call = arch.call(size, device="cpu")

    def count() -> int:
        with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(**call)
        return counter.get_total_flops() // 2

    method = Matched(rate=0.5)
    figures = cost(model, method, size=size, guidance=False).figures()
    assert count() == figures.dense
    with atedm.pruned(model, method):
        assert count() == figures.normal_step


@pytest.mark.parametrize("name", NAMES)
def test_models_by_name_cost_what_a_budget_says(name: str) -> None:
    matched = TRANSFORMER_METHODS["matched"]
    fitted = fit_to_budget(name, matched, share=0.6, steps=4)
    assert run_cost(name, fitted, steps=4) == pytest.approx(0.6, abs=1e-3)
    assert run_cost(name, fitted, steps=4) <= 0.6
    # Two steps of four are dense, or where that cannot be, one, or none.
    assert fit_to_budget(name, matched, share=0.75, steps=4).dense_share == 0.3
    assert fit_to_budget(name, matched, share=0.4, steps=4).dense_share == FIRST_STEP
    assert fit_to_budget(name, matched, share=0.2, steps=4).dense_share == 0
    with pytest.raises(CostOutOfReach, match="pruning reaches down to"):
        fit_to_budget(name, matched, share=0.001, steps=4)


def test_the_figures_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cost.md").read_text()
    matched = TRANSFORMER_METHODS["matched"]
    for name in NAMES:
        arch = architecture(name)
        dense = profile_of(arch).dense() * (1 + arch.guidance) / 1e12
        shares = " | ".join(f"{run_cost(name, matched, steps=steps):.3f}" for steps in (28, 4))
        assert f"| `{name}` | {dense:.1f} | {shares} |" in page


def test_the_size_of_flux_is_the_published_one() -> None:
    arch = architecture("flux")
    assert round(sum(p.numel() for p in arch.on_meta().parameters()) / 1e9, 1) == 11.9
    assert arch.grid() == (64, 64)
    assert arch.words == 512


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        profile_of(architecture("flux"), (1024, 1032))
