"""What a pruned transformer does with calls that ask for more: carried, run dense, or refused with a sentence."""

import copy
import logging
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import atedm
from atedm import AtEdm, Matched
from atedm.hosts import diffusers_dit
from atedm.hosts.dit_attention import SeenAttention, _with_channel
from atedm.hosts.models import attach
from atedm.method.correction import Correction
from transformers_of import CONFIGS, call_of, image_of, transformer

FLUX, SD3, QWEN = "FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"
HALF = Matched(rate=0.5)


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    diffusers_dit._say_once.cache_clear()


def with_controlnet(name: str, call: dict[str, Any]) -> dict[str, Any]:
    if name == SD3:
        return call | {"block_controlnet_hidden_states": [torch.randn(2, 64, 16)] * 2}
    return call | {"controlnet_block_samples": [torch.randn(2, 64, 32)] * 2}


@pytest.mark.parametrize("name", [FLUX, SD3, QWEN])
@torch.no_grad()
def test_residuals_of_a_controlnet_leave_the_call_dense_and_say_so(name: str, caplog: Any) -> None:
    model, call = transformer(name), call_of(name)
    controlled = with_controlnet(name, call)
    dense, expected = image_of(model(**controlled)), image_of(model(**call))
    atedm.apply(model, HALF)
    with caplog.at_level(logging.WARNING, "atedm"):
        assert torch.equal(image_of(model(**controlled)), dense)
        model(**controlled)
    assert len(caplog.records) == 1
    assert "ControlNet" in caplog.text
    assert not torch.equal(image_of(model(**call)), expected)


@torch.no_grad()
def test_skipped_layers_leave_the_call_dense() -> None:
    model, call = transformer(SD3), call_of(SD3)
    skipping = call | {"skip_layers": [2]}
    dense = image_of(model(**skipping))
    atedm.apply(model, HALF)
    assert torch.equal(image_of(model(**skipping)), dense)


class ReadsByPlace(FluxAttnProcessor):
    """Stands for a processor that diffusers does not have."""


@torch.no_grad()
def test_code_that_is_not_diffusers_own_leaves_the_call_dense(caplog: Any) -> None:
    model, call = transformer(FLUX), call_of(FLUX)
    dense = image_of(model(**call))
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    attention = model.transformer_blocks[2].attn
    own = attention.processor
    attention.set_processor(ReadsByPlace())
    with caplog.at_level(logging.WARNING, "atedm"):
        assert torch.equal(image_of(model(**call)), dense)
    assert "its attention processor ReadsByPlace is not diffusers' own" in caplog.text
    attention.set_processor(own)
    assert torch.equal(image_of(model(**call)), pruned)
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert torch.equal(image_of(model(**call)), dense)


@torch.no_grad()
def test_a_cache_of_blocks_goes_on_top() -> None:
    model, call = transformer(FLUX), call_of(FLUX)
    atedm.apply(model, HALF)
    pruned = image_of(model(**call))
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("cond"):
        assert torch.equal(image_of(model(**call)), pruned)
        reused = image_of(model(**call))  # all blocks but the first are left out
    assert reused.isfinite().all()
    model.disable_cache()
    atedm.remove(model)
    assert not any("_atedm" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_cache_of_attentions_leaves_the_call_dense(caplog: Any) -> None:
    model, call = transformer(FLUX), call_of(FLUX)
    dense = image_of(model(**call))
    atedm.apply(model, HALF)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    with caplog.at_level(logging.WARNING, "atedm"):
        assert torch.equal(image_of(model(**call)), dense)
    assert "pyramid_attention_broadcast" in caplog.text


def test_gradient_checkpointing_is_refused_and_gradients_flow_without() -> None:
    model, call = transformer(SD3), call_of(SD3)
    atedm.apply(model, HALF)
    image_of(model(**call)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.transformer_blocks[2].attn.parameters())
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**call)
    with torch.no_grad():
        model(**call)


def test_masks_of_an_ip_adapter_are_refused() -> None:
    model = transformer(FLUX)
    atedm.apply(model, HALF)
    with pytest.raises(ValueError, match="ip_adapter_masks"):
        model(**call_of(FLUX), joint_attention_kwargs={"ip_adapter_masks": torch.ones(1)})


def test_transformers_that_cannot_be_pruned_are_refused_with_the_reason() -> None:
    model = diffusers.SanaTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, num_cross_attention_heads=1,
        cross_attention_head_dim=8, cross_attention_dim=8, caption_channels=8, sample_size=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="convolution"):
        atedm.apply(model)
    lumina = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, axes_dim_rope=(4, 2, 2), cap_feat_dim=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"Lumina2Transformer2DModel.*FLUX"):
        atedm.apply(lumina)


def test_a_block_of_another_class_is_refused_and_nothing_is_changed() -> None:
    class OwnBlock(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    model = transformer(SD3)
    model.transformer_blocks[2] = OwnBlock()
    with pytest.raises(TypeError, match="OwnBlock"):
        atedm.apply(model, HALF)
    assert not any("_atedm" in vars(module) for module in model.modules())
    model = transformer(SD3)
    model.transformer_blocks[2].forward = model.transformer_blocks[2].forward
    with pytest.raises(ValueError, match="already overridden"):
        atedm.apply(model, HALF)


@torch.no_grad()
def test_an_error_in_the_middle_leaves_the_model_usable() -> None:
    model, call = transformer(FLUX), call_of(FLUX)
    atedm.apply(model, HALF)
    expected = image_of(model(**call))

    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    hook = model.transformer_blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        model(**call)
    hook.remove()
    assert torch.equal(image_of(model(**call)), expected)


@pytest.mark.parametrize("name", [FLUX, SD3, QWEN, "WanTransformer3DModel"])
@torch.no_grad()
def test_lora_takes_part(name: str) -> None:
    model, call = transformer(name), call_of(name)
    atedm.apply(model, HALF)
    without = image_of(model(**call))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    with_lora = image_of(model(**call))
    assert not torch.equal(with_lora, without)
    assert torch.equal(image_of(copy.deepcopy(model)(**call)), with_lora)
    model.disable_adapters()
    torch.testing.assert_close(image_of(model(**call)), without)


@pytest.mark.parametrize("name", [FLUX, SD3, "ZImageTransformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize("method", [HALF, AtEdm(rate=0.5)], ids=["matched", "at-edm"])
@torch.no_grad()
def test_half_precision_runs(name: str, method: Any) -> None:
    model = transformer(name).to(torch.bfloat16)
    call = call_of(name)
    half = {
        key: [x.bfloat16() for x in value]
        if isinstance(value, list) and isinstance(value[0], Tensor)
        else value.bfloat16()
        if isinstance(value, Tensor) and value.is_floating_point() and "timestep" not in key and "ids" not in key
        else value
        for key, value in call.items()
    }
    atedm.apply(model, method)
    image = image_of(model(**half))
    assert image.dtype == torch.bfloat16
    assert image.isfinite().all()


@torch.no_grad()
def test_protected_tokens_are_kept() -> None:
    model, call = transformer(SD3), call_of(SD3)
    mask = torch.zeros(8, 8)
    mask[2:4, 2:4] = 1
    atedm.apply(model, Matched(rate=0.8), protect=mask)
    with atedm.recorded(model) as recording:
        model(**call)
    (seen,) = recording.observations
    wanted = {8 * y + x for y in (2, 3) for x in (2, 3)}
    assert seen.size == (8, 8)
    assert all(wanted <= set(row.tolist()) for row in seen.keep)
    assert recording.kept_share == seen.keep.shape[1] / 64
    atedm.remove(model)
    atedm.apply(model, Matched(rate=0.99), protect=mask)
    with pytest.raises(ValueError, match="protected"):
        model(**call)


def test_a_channel_more_is_a_bias_and_counts_are_copies() -> None:
    # In float64: attention in which keys stand for n tokens each is attention over n copies of them.
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 16, dtype=torch.float64) for _ in range(3))
    counts = torch.tensor([[1.0, 2, 3, 1, 4], [2.0, 2, 1, 1, 4]])
    copies = torch.cat([torch.ones(2, 2), counts], 1).long()
    attention = nn.functional.scaled_dot_product_attention
    expected = torch.stack(
        [attention(q[b], k[b].repeat_interleave(copies[b], 1), v[b].repeat_interleave(copies[b], 1)) for b in range(2)]
    )
    seen: list[Any] = []
    with SeenAttention((7,), (2,), 5, counts, seen):
        found = attention(q, k, v)
        other = attention(q, k, v)  # a second attention of the same lengths is not the image's
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(other, attention(q, k, v))
    assert torch.equal(seen[0].q, q[:, :, 2:])
    column = nn.functional.pad(counts.double().log(), (2, 0))[:, None, None] / 16**-0.5
    given = {"query": q, "key": k, "value": v}
    torch.testing.assert_close(_with_channel(attention, given, column), expected, rtol=1e-6, atol=1e-6)


def some_correction() -> Correction:
    """Of the second and third step of four."""
    width = transformer(SD3, num_layers=4).inner_dim
    maps = 0.05 * torch.randn(3, 4 * width, width, generator=torch.Generator().manual_seed(1))
    maps[0] = 0
    return Correction({"transformer_blocks[1:4]": maps})


@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        (Matched(rate=0.5, dense_share=0.01), 2),
        (Matched(rate=0.5, dense_share=0.01, correction=some_correction()), 2),
        (AtEdm(rate=0.5, spare=None), 1),
    ],
    ids=["matched", "fitted", "at-edm"],
)
@torch.no_grad()
def test_it_compiles_whole_with_a_graph_for_each_kind_of_step(method: Any, graphs: int) -> None:
    model, call = transformer(SD3, num_layers=4), call_of(SD3)
    atedm.apply(model, method)
    steps = [call | {"timestep": torch.full((2,), v)} for v in (1000, 800, 600, 400)]
    never_run = copy.deepcopy(model)
    eager = [image_of(model(**step)) for step in steps]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(never_run, backend=counter, fullgraph=True)
    for step, expected in zip(steps, eager, strict=True):
        torch.testing.assert_close(image_of(compiled(**step)), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, expected in zip(steps, eager, strict=True):
            torch.testing.assert_close(image_of(compiled(**step)), expected, rtol=1e-4, atol=1e-4)


def test_every_family_names_the_blocks_it_prunes() -> None:
    for name in CONFIGS:
        model = transformer(name)
        attach(model, HALF)
        for span in model._atedm.spans:
            blocks, _, bounds = span.partition("[")
            start, end = map(int, bounds.rstrip("]").split(":"))
            own = [hasattr(block, "_atedm") for block in model.get_submodule(blocks)]
            assert own == [start <= index < end for index in range(len(own))]
