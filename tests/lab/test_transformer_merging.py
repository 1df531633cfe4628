"""ToMe in a transformer: what tomesd does in a U-Net, counted, and gone afterwards."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tomesd.merge import bipartite_soft_matching_random2d
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atedm.costs.architectures import architecture
from atedm.costs.budget import fit_to_budget, profile_of, run_cost
from atedm.costs.flops import flop_counter
from atedm.costs.tome import ToMe
from atedm.hosts.diffusers_dit import find_transformer_spans
from atedm.lab.methods.by_name import method_by_name
from atedm.lab.methods.peers import Merging
from transformers_of import transformer

SD3 = "SD3Transformer2DModel"
SIZE = (128, 96)


@pytest.fixture
def model() -> Any:
    return transformer(SD3)


def run(model: Any, seed: int | None = None, ratio: float = 0.5) -> Tensor:
    """One call; without a seed a dense one."""
    call = architecture(model).call(SIZE, 2, device="cpu")
    if seed is None:
        return model(**call)[0]
    with Merging(ToMe(ratio)).applied(SimpleNamespace(transformer=model), seed):
        return model(**call)[0]


@torch.no_grad()
def test_each_part_of_a_block_runs_on_merged_tokens_and_is_copied_back(model: Any) -> None:
    block = next(iter(find_transformer_spans(model).values()))[1][0]
    seen: list[Any] = []
    note = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs or args), with_kwargs=True)
    after: list[Any] = []
    note_after = block.register_forward_hook(lambda *given: after.append(given[-1]))
    run(model, seed=3)
    note.remove()
    note_after.remove()
    given = seen[0]
    x, text, temb = (given[name] for name in ("hidden_states", "encoder_hidden_states", "temb"))
    height, width = architecture(model).grid(SIZE)
    generator = torch.Generator("cpu").manual_seed(3)
    merge, unmerge = bipartite_soft_matching_random2d(x, width, height, 2, 2, x.shape[1] // 2, generator=generator)
    normed, gate, shift, scale, gate_ff, *dual = block.norm1(x, emb=temb)
    normed_text, *_ = block.norm1_context(text, emb=temb)
    attended, _ = block.attn(hidden_states=merge(normed), encoder_hidden_states=normed_text)
    x = x + gate[:, None] * unmerge(attended)
    if block.attn2 is not None:  # SD3.5's second attention, among image tokens
        normed, gate = dual
        x = x + gate[:, None] * unmerge(block.attn2(hidden_states=merge(normed)))
    x = x + gate_ff[:, None] * unmerge(block.ff(merge(block.norm2(x) * (1 + scale[:, None]) + shift[:, None])))
    torch.testing.assert_close(after[0][1], x)


@torch.no_grad()
def test_nothing_merged_is_dense_and_nothing_stays(model: Any) -> None:
    dense = run(model)
    assert torch.equal(run(model, 0, ratio=0.0), dense)
    merged = run(model, 0)
    assert not torch.equal(merged, dense)
    assert torch.equal(run(model, 0), merged)
    assert not torch.equal(run(model, 1), merged)
    assert torch.equal(run(model), dense)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_formula_is_what_torch_counts(model: Any, ratio: float) -> None:
    profile = profile_of(architecture(model), SIZE)
    with flop_counter() as counted, sdpa_kernel(SDPBackend.MATH):
        run(model, 0, ratio=ratio)
    assert counted.get_total_flops() // 2 == 2 * profile.mean(ToMe(ratio), 1)


def test_a_cost_is_solved_and_other_blocks_and_settings_are_refused(model: Any) -> None:
    fitted = fit_to_budget(model, ToMe(), share=0.95, size=SIZE)
    assert run_cost(model, fitted, size=SIZE) == pytest.approx(0.95, abs=0.02)
    assert method_by_name("tome[cost=0.7]", "sd35-medium").tome.ratio > 0  # type: ignore[attr-defined]
    flux = SimpleNamespace(transformer=transformer("FluxTransformer2DModel"))
    with pytest.raises(ValueError, match="written for the blocks of SD3"), Merging(ToMe()).applied(flux):
        pass
    sd3 = SimpleNamespace(transformer=model)
    with pytest.raises(ValueError, match="a ratio and nothing else"), Merging(ToMe(levels="highest")).applied(sd3):
        pass
