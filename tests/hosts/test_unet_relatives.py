"""Models that are not a plain U-Net but hold its blocks, wrappers around one, and processors that read by place."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMScheduler,
    MotionAdapter,
    MultiControlNetModel,
    StableDiffusionSAGPipeline,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.hooks import (
    HookRegistry,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import atedm
from atedm import AtEdm, Matched
from atedm.hosts import diffusers_unet
from atedm.hosts.attention import TRUSTED_PROCESSORS
from models import WIDTH, inputs, run, sd1_unet, sdxl_pipeline, sdxl_unet, small_unet, tokenizer, watched


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    diffusers_unet._say_once.cache_clear()


class Subclass(UNet2DConditionModel):
    """As people make them to add a method."""


class StoresMaps(AttnProcessor2_0):
    """Stands for a processor that works on any number of tokens, though diffusers does not have it."""


def test_a_subclass_is_pruned_like_its_class() -> None:
    unet = small_unet()
    child = Subclass.from_config(unet.config).eval()
    child.load_state_dict(unet.state_dict())
    atedm.apply(unet)
    atedm.apply(child)
    assert torch.equal(run(unet), run(child))
    atedm.remove(child)
    assert type(child) is Subclass


def test_spatial_blocks_of_a_video_model_are_pruned_and_its_temporal_ones_left_alone() -> None:
    unet = sd1_unet()
    adapter = MotionAdapter(
        block_out_channels=(16, 32, 32),
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    model = UNetMotionModel.from_unet2d(unet, adapter).eval()
    call = inputs(unet, batch=1)
    sample = call["sample"].unsqueeze(2).repeat(1, 1, 4, 1, 1)  # four frames
    words = call["encoder_hidden_states"].repeat(4, 1, 1)
    with torch.no_grad():
        dense = model(sample, 500, words).sample
        summary = atedm.apply(model, Matched())
        assert all("motion_modules" not in name for name in summary.pruned)
        pruned = model(sample, 500, words).sample
        atedm.remove(model)
        assert torch.equal(model(sample, 500, words).sample, dense)
    assert pruned.shape == dense.shape
    assert not torch.equal(pruned, dense)


@pytest.mark.parametrize("method", [Matched(), AtEdm(spare=None)], ids=["matched", "paper"])
@torch.no_grad()
def test_a_unet_that_runs_with_its_controlnet_xs_is_pruned_in_both(method: Any) -> None:
    unet = sdxl_unet()
    model = UNetControlNetXSModel.from_unet(unet, ControlNetXSAdapter.from_unet(unet, size_ratio=0.5)).eval()
    call = inputs(unet)
    edges = torch.rand(len(call["sample"]), 3, *(8 * side for side in call["sample"].shape[2:]))

    def draw() -> Tensor:
        words = call["encoder_hidden_states"]
        sample: Tensor = model(call["sample"], 500, words, edges, added_cond_kwargs=call["added_cond_kwargs"]).sample
        return sample

    dense = draw()
    summary = atedm.apply(model, method)
    assert any("base_attentions" in name for name in summary.pruned)
    assert any("ctrl_attentions" in name for name in summary.pruned)
    assert not torch.equal(draw(), dense)
    assert torch.equal(draw(), draw())
    atedm.remove(model)
    assert torch.equal(draw(), dense)


def test_a_union_controlnet_is_pruned() -> None:
    control = ControlNetUnionModel.from_unet(sdxl_unet())
    assert atedm.apply(control).pruned
    atedm.remove(control)


def test_several_controlnets_are_pruned_one_by_one() -> None:
    nets = [ControlNetModel.from_unet(small_unet()) for _ in range(2)]
    with pytest.raises(TypeError, match=r"prune its ControlNets one by one: atedm\.apply\(each\) for its \.nets"):
        atedm.apply(MultiControlNetModel(nets))


def test_a_model_in_threads_is_refused_and_one_in_processes_is_looked_through() -> None:
    unet = small_unet()
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        atedm.apply(nn.DataParallel(unet))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(unet)
        atedm.apply(wrapped)
        call = inputs(unet)
        wrapped(**call, timestep=500).sample.square().mean().backward()
        assert unet.conv_in.weight.grad is not None
        fresh = copy.deepcopy(small_unet())
        atedm.apply(fresh)
        with torch.no_grad():
            assert torch.equal(wrapped(**call, timestep=500).sample, run(fresh, 500))
        atedm.remove(wrapped)
    finally:
        dist.destroy_process_group()


# --- processors that are not diffusers' own ---------------------------------------------------------------------------


def set_strange(unet: UNet2DConditionModel, part: str) -> None:
    processors = {name: StoresMaps() if part in name else processor for name, processor in unet.attn_processors.items()}
    unet.set_attn_processor(processors)


def test_a_block_with_a_strange_processor_is_left_dense_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    unet = small_unet()
    set_strange(unet, "mid_block")
    atedm.apply(unet, Matched())
    with watched(unet) as calls, caplog.at_level(logging.WARNING, "atedm"):
        run(unet)
        run(unet)
    assert "mid_block.attentions.0" not in calls[0].kept
    assert calls[0].kept  # the others are pruned
    said = [record.message for record in caplog.records if "StoresMaps" in record.message]
    assert len(said) <= 1  # once a process
    unet.set_attn_processor(AttnProcessor2_0())  # it may change at any time
    with watched(unet) as calls:
        run(unet)
    assert "mid_block.attentions.0" in calls[0].kept


def test_a_processor_may_be_trusted() -> None:
    unet = small_unet()
    set_strange(unet, "")
    atedm.apply(unet, Matched())
    TRUSTED_PROCESSORS.add(StoresMaps)
    try:
        with watched(unet) as calls:
            run(unet)
    finally:
        TRUSTED_PROCESSORS.remove(StoresMaps)
    assert calls[0].kept.keys() == set(unet._atedm.spans)


def test_what_the_first_layer_reads_does_not_matter_where_it_runs_on_all_tokens() -> None:
    unet = small_unet()
    set_strange(unet, "mid_block.attentions.0.transformer_blocks.0.")
    atedm.apply(unet, AtEdm(spare=None))
    with watched(unet) as calls:
        run(unet)
    assert "mid_block.attentions.0" in calls[0].kept


class AppendsKeys(AttnProcessor2_0):
    """As reference-only generation does it: self-attention also sees the tokens of another image."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *a: Any, **kw: Any) -> Any:
        if encoder_hidden_states is None:
            encoder_hidden_states = torch.cat([hidden_states, hidden_states.flip(0)], dim=1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *a, **kw)


class AttendsToFirst(AttnProcessor2_0):
    """As cross-frame attention does it: all frames attend to the tokens of the first."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *a: Any, **kw: Any) -> Any:
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states[:1].expand_as(hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *a, **kw)


def hold_outputs(attention: nn.Module) -> None:
    """Lay a forward over an attention that keeps its first output and gives it again, as T-GATE does."""
    own, held = attention.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        held.append(own(*args, **kwargs))
        return held[0]

    attention.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("method", [Matched(), AtEdm(spare=None)], ids=["matched", "paper"])
@pytest.mark.parametrize("processor", [AppendsKeys(), AttendsToFirst()], ids=["reference-only", "cross-frame"])
def test_keys_of_other_images_leave_a_block_dense(method: Any, processor: Any) -> None:
    """Counts of kept tokens would be laid over keys that they do not belong to."""
    unet, call = small_unet(), inputs(small_unet())
    unet.set_attn_processor({name: processor if "attn1" in name else own for name, own in unet.attn_processors.items()})
    with torch.no_grad():
        dense = unet(**call, timestep=500).sample
        atedm.apply(unet, method)
        assert torch.equal(unet(**call, timestep=500).sample, dense)


@pytest.mark.parametrize("method", [Matched(), AtEdm(spare=None)], ids=["matched", "paper"])
def test_outputs_that_are_held_for_later_steps_leave_a_block_dense(
    method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gated = small_unet()
    for name, module in gated.named_modules():
        if name.endswith("attn2"):
            hold_outputs(module)
    expected = [run(gated, 900), run(gated, 100)]
    unet = small_unet()
    atedm.apply(unet, method)
    for name, module in unet.named_modules():  # T-GATE lays it over while the pipeline runs
        if name.endswith("attn2"):
            hold_outputs(module)
            add_hook_to_module(module, ModelHook())  # and offload may lie over that
    with caplog.at_level(logging.WARNING, "atedm"):
        assert torch.equal(run(unet, 900), expected[0])
        assert torch.equal(run(unet, 100), expected[1])
    assert "the forward of attn2 is hold_outputs.<locals>.forward, which is not diffusers' own" in caplog.text


@pytest.mark.parametrize("method", [Matched(), AtEdm(spare=None)], ids=["matched", "paper"])
def test_a_cache_of_attention_outputs_leaves_a_block_dense(method: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Pyramid attention broadcast would add the output for the tokens of one step to those of the next."""

    def cached(unet: UNet2DConditionModel) -> UNet2DConditionModel:
        skip: dict[str, Any] = {f"cross_attention_{name}": value for name, value in _EVERY_SECOND_CALL.items()}
        config = PyramidAttentionBroadcastConfig(**skip, current_timestep_callback=lambda: 500)
        apply_pyramid_attention_broadcast(unet, config)
        return unet

    expected = [run(unet := cached(small_unet()), 900), run(unet, 800)]
    assert not torch.equal(run(small_unet(), 800), expected[1])  # it does something
    pruned = small_unet()
    atedm.apply(pruned, method)
    cached(pruned)
    with caplog.at_level(logging.WARNING, "atedm"):
        assert torch.equal(run(pruned, 900), expected[0])
        assert torch.equal(run(pruned, 800), expected[1])
    assert "pyramid_attention_broadcast keeps what attn2 gave for other tokens" in caplog.text


_EVERY_SECOND_CALL = {
    "block_skip_range": 2,
    "timestep_skip_range": (0, 1000),
    "block_identifiers": ("transformer_blocks",),
}


def test_hooks_of_accelerate_and_diffusers_do_not_leave_a_block_dense() -> None:
    unet = small_unet()
    atedm.apply(unet, Matched())
    pruned = run(unet)
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            add_hook_to_module(module, ModelHook())
            HookRegistry.check_if_exists_or_initialize(module).register_hook(DiffusersHook(), "nothing")
    assert torch.equal(run(unet), pruned)


@pytest.mark.parametrize("method", ["matched"])
def test_self_attention_guidance_runs_and_is_that_of_a_dense_middle(method: str) -> None:
    """It stores the attention map of the middle block by place, and blurs the image there."""
    parts = sdxl_pipeline()
    unet = sd1_unet(
        cross_attention_dim=WIDTH, down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), sample_size=16
    )
    pipe: Any = StableDiffusionSAGPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> Tensor:
        latents: Tensor = pipe(
            "a duck",
            num_inference_steps=3,
            sag_scale=0.8,
            height=64,
            width=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        return latents

    dense = drawn()
    with atedm.pruned(pipe, method):
        pruned = drawn()
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, dense)
    assert torch.equal(drawn(), dense)
