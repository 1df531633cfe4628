"""What cannot be honoured is refused with a message that says why, before any work, and nothing has been changed."""

import functools
import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tomesd
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    Transformer2DModel,
    UNet2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import atedm
from atedm import AtEdm, Matched, Place
from atedm.tiny.autoencoder import build_autoencoder
from models import LATE, each_layer, run, scheduler, sd1_unet, sdxl_pipeline, sdxl_unet, small_unet, snapshot


def assert_refused(unet: Any, method: Any, error: type[Exception], message: str) -> None:
    """Apply must raise and leave no trace."""
    before = snapshot(unet)
    with pytest.raises(error, match=message):
        atedm.apply(unet, method)
    assert snapshot(unet) == before
    assert not atedm.is_applied(unet)


# --- the target -------------------------------------------------------------------------------------------------------


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8)
    return DiTPipeline(transformer, build_autoencoder(), scheduler())


def unconditional() -> UNet2DModel:
    return UNet2DModel(
        8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (
            dit,
            r"^DiTPipeline has no U-Net and no transformer known here \(it has .*transformer: DiTTransformer2DModel.*",
        ),
        (lambda: dit().transformer, "^found a DiTTransformer2DModel"),
        (lambda: DDPMPipeline(unconditional(), scheduler()), "^found a UNet2DModel"),
        (unconditional, "^found a UNet2DModel"),
        (lambda: nn.Linear(2, 2), "^found a Linear"),
        (lambda: torch.compile(nn.Linear(2, 2), backend="eager"), "^found a Linear"),
        (lambda: None, "^NoneType has no U-Net and no transformer known here"),
        (lambda: "stabilityai/sdxl-turbo", "^str has no U-Net and no transformer known here"),
    ],
    ids=["dit", "transformer", "ddpm", "unet-2d", "linear", "compiled", "none", "name"],
)
def test_another_kind_of_model_is_refused_by_name(target: Callable[[], Any], found: str) -> None:
    model = target()
    works = "; atedm prunes the attention blocks of a UNet2DConditionModel, so it works on .*XLPipeline.*FLUX"
    for verb in (atedm.apply, atedm.remove, atedm.is_applied):
        with pytest.raises(TypeError, match=found + works):
            verb(model)


def test_a_unet_without_attention_is_refused() -> None:
    unet = small_unet(down_block_types=("DownBlock2D", "DownBlock2D"), mid_block_type=None)
    assert_refused(unet, "paper", ValueError, "no attention blocks .*so there is nothing to prune")


# --- the method -------------------------------------------------------------------------------------------------------


def test_what_is_no_method_is_refused() -> None:
    for method in (0.63, {"rate": 0.5}, AtEdm, Matched):
        assert_refused(
            small_unet(), method, TypeError, "method must be a Matched, an AtEdm or a name such as 'matched', not "
        )


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    assert_refused(small_unet(), "tubro", ValueError, r"unknown method 'tubro'; did you mean 'turbo'\?")


@pytest.mark.parametrize("kind", [AtEdm, Matched])
def test_where_that_names_no_block_is_refused(kind: type) -> None:
    message = "nothing to prune: .* names none of the 2 attention blocks"
    assert_refused(small_unet(), kind(where=lambda place: False), ValueError, message)
    at_level = functools.partial(lambda level, place: place.level == level, 9)
    assert_refused(small_unet(), kind(where=at_level), ValueError, message)


def test_a_where_that_raises_leaves_the_model_as_it_was() -> None:
    assert_refused(small_unet(), AtEdm(where=lambda place: place.nonsense), AttributeError, "nonsense")  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["paper", "dagger", "turbo", AtEdm(0.1)])
def test_at_edm_has_nothing_to_prune_in_blocks_of_one_layer_and_the_message_names_what_works(method: Any) -> None:
    unet = sd1_unet()
    message = (
        r"nothing to prune: the attention blocks of this model have 1 layer, as those of SD 1\.x and 2\.x have, and "
        r'AT-EDM†? runs 1 on all tokens; atedm\.apply\(pipe, "matched"\) works here'
    )
    assert_refused(unet, method, ValueError, message)
    assert len(atedm.apply(unet, "matched").pruned) == 11


def test_only_blocks_with_something_to_gain_are_patched() -> None:
    unet = sdxl_unet(transformer_layers_per_block=(1, 1, 3))
    summary = atedm.apply(unet, "paper")
    assert {shape.place.level for shape in summary.shapes if shape.place.name in summary.pruned} == {3}
    assert "6 of 11 blocks are pruned" in str(summary)


def test_a_place_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="stage must be 'down', 'mid' or 'up', not 'middle'"):
        Place("middle", 1, 0, 1, 2, "mid_block")
    with pytest.raises(ValueError, match="index below count"):
        Place("mid", 1, 1, 1, 2, "mid_block")


# --- the state of the model -------------------------------------------------------------------------------------------


def test_applying_twice_is_refused_and_the_first_stays() -> None:
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, "paper")
    before, output = snapshot(pipe.unet), run(pipe.unet)
    for target in (pipe, pipe.unet):
        with pytest.raises(ValueError, match=r"patched already; call atedm\.remove\(\.\.\.\) first"):
            atedm.apply(target, "matched")
    assert snapshot(pipe.unet) == before
    assert torch.equal(run(pipe.unet), output)
    atedm.remove(pipe)


def test_a_forward_overridden_on_the_instance_is_refused() -> None:
    unet = small_unet()
    block = unet.get_submodule("down_blocks.1.attentions.0")
    block.forward = functools.partial(Transformer2DModel.forward, block)
    assert_refused(
        unet, "paper", ValueError, r"forward of down_blocks\.1\.attentions\.0 is already overridden on the instance"
    )


def test_an_offload_hook_on_a_block_is_refused_with_the_order_that_works() -> None:
    unet = small_unet()
    add_hook_to_module(unet.get_submodule("mid_block.attentions.0"), AlignDevicesHook("cpu"))
    assert_refused(
        unet, "paper", ValueError, r"mid_block\.attentions\.0 is already overridden .*apply atedm first, then that"
    )


def test_a_block_of_another_class_is_refused() -> None:
    class Other(Transformer2DModel):
        pass

    unet = small_unet()
    unet.get_submodule("mid_block.attentions.0").__class__ = Other
    assert_refused(unet, "paper", TypeError, "mid_block.attentions.0 is a Other, not diffusers' own Transformer2DModel")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("norm_type", "ada_norm"), ("pos_embed", nn.Identity()), ("only_cross_attention", True), ("attn2", None)],
)
def test_a_layer_of_a_kind_not_known_is_refused(attribute: str, value: Any) -> None:
    unet = small_unet()
    setattr(unet.get_submodule("mid_block.attentions.0").transformer_blocks[1], attribute, value)
    assert_refused(
        unet, "paper", ValueError, r"mid_block\.attentions\.0\.transformer_blocks\.1 is of a kind not known here"
    )


def test_a_layer_that_is_no_basic_transformer_block_is_refused() -> None:
    unet = small_unet()
    unet.get_submodule("mid_block.attentions.0").transformer_blocks[1] = nn.Identity()
    assert_refused(unet, "paper", TypeError, "transformer_blocks.1 is a Identity, not a BasicTransformerBlock")


class Quiet(BasicTransformerBlock):  # type: ignore[misc]
    """A layer as other patches make it of diffusers' own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return halved(self, *args, **kwargs)


def halved(layer: BasicTransformerBlock, *args: Any, **kwargs: Any) -> Any:
    return 0.5 * BasicTransformerBlock.forward(layer, *args, **kwargs)


@pytest.mark.parametrize("method", ["paper", "matched"])
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_a_changed_layer_runs_as_it_is(method: str, how: str) -> None:
    unet = small_unet()
    with atedm.pruned(unet, method):
        plain = run(unet)
    for layer in unet.get_submodule("mid_block.attentions.0").transformer_blocks:
        if how == "subclass":
            layer.__class__ = Quiet
        else:
            layer.forward = functools.partial(halved, layer)
    with atedm.pruned(unet, method):
        assert not torch.equal(run(unet), plain)


# --- forward chunking -------------------------------------------------------------------------------------------------

CHUNKING = r"forward chunking over tokens on \(dim=1\).*set_chunk_feed_forward\(None\).*dim=0"


def test_chunking_over_tokens_is_refused_when_it_was_set_before() -> None:
    unet = small_unet()
    each_layer(unet, lambda layer: layer.set_chunk_feed_forward(1, dim=1))  # type: ignore[operator]
    assert_refused(unet, "paper", ValueError, CHUNKING)


@pytest.mark.parametrize("timestep", [999, 1])
def test_chunking_over_tokens_is_refused_when_it_is_set_after(timestep: int) -> None:
    unet = small_unet()
    atedm.apply(unet)
    pruned = run(unet, timestep)
    each_layer(unet, lambda layer: layer.set_chunk_feed_forward(1, dim=1))  # type: ignore[operator]
    worked = []
    hook = unet.conv_in.register_forward_hook(lambda *_: worked.append(1))
    with pytest.raises(ValueError, match=CHUNKING):
        run(unet, timestep)
    assert not worked
    each_layer(unet, lambda layer: layer.set_chunk_feed_forward(None))  # type: ignore[operator]
    assert torch.equal(run(unet, timestep), pruned)
    hook.remove()


@pytest.mark.parametrize("first", ["tomesd", "atedm"])
def test_tokens_that_are_merged_too_are_refused(first: str) -> None:
    pipe = sdxl_pipeline(small_unet())
    if first == "tomesd":
        tomesd.apply_patch(pipe, max_downsample=4)
        assert_refused(pipe.unet, "paper", ValueError, "merge tokens .*remove_patch")
    else:
        atedm.apply(pipe)
        tomesd.apply_patch(pipe, max_downsample=4)
        with pytest.raises(ValueError, match=r"merge tokens .*remove_patch"):
            run(pipe.unet)
        atedm.remove(pipe)
    tomesd.remove_patch(pipe)
    plain = run(pipe.unet)
    with atedm.pruned(pipe):
        assert not torch.equal(run(pipe.unet), plain)


def test_chunking_over_the_batch_is_honoured() -> None:
    unet = small_unet()
    atedm.apply(unet)
    pruned = run(unet)
    each_layer(unet, lambda layer: layer.set_chunk_feed_forward(1, dim=0))  # type: ignore[operator]
    torch.testing.assert_close(run(unet), pruned, rtol=1e-3, atol=1e-3)


# --- a call -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 64)},
            r"attention_mask masks tokens by their place.*call atedm\.remove first",
        ),
        (
            {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}},
            "ip_adapter_masks are laid over the tokens by their number.*leave the masks out",
        ),
    ],
    ids=["attention-mask", "ip-adapter-masks"],
)
@pytest.mark.parametrize("timestep", [999, 1])
def test_masks_of_tokens_are_refused_before_any_work(changes: dict[str, Any], message: str, timestep: int) -> None:
    unet = small_unet()
    atedm.apply(unet)
    before = run(unet, timestep)
    worked = []
    hook = unet.conv_in.register_forward_hook(lambda *_: worked.append(1))
    with pytest.raises(ValueError, match=message):
        run(unet, timestep, **changes)
    assert not worked
    hook.remove()
    assert torch.equal(run(unet, timestep), before)


def test_an_attention_mask_is_refused_by_position_too() -> None:
    unet = small_unet()
    atedm.apply(unet)
    x, text = torch.zeros(1, 4, 16, 16), torch.zeros(1, 7, 96)
    with pytest.raises(ValueError, match="attention_mask"):
        unet(x, LATE, text, None, None, torch.ones(1, 64))
    with pytest.raises(ValueError, match="ip_adapter_masks"):
        unet(x, LATE, text, None, None, None, {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]})


def test_masks_that_are_none_are_no_masks() -> None:
    unet = small_unet()
    atedm.apply(unet)
    assert torch.equal(run(unet, attention_mask=None, cross_attention_kwargs=None), run(unet))


def test_a_call_without_a_timestep_is_left_to_diffusers_to_refuse() -> None:
    unet = small_unet()
    atedm.apply(unet)
    with pytest.raises(TypeError, match="timestep"):
        unet(sample=torch.zeros(1, 4, 16, 16), encoder_hidden_states=torch.zeros(1, 7, 96))


@pytest.mark.parametrize(
    ("kind", "name", "now", "says"),
    [
        (Transformer2DModel, "forward", lambda self, hidden_states, rope=None: None, "rope"),
        (BasicTransformerBlock, "forward", lambda self, hidden_states: None, "attention_mask"),
        (Transformer2DModel, "_operate_on_continuous_inputs", None, "hidden_states"),
    ],
    ids=["one more argument", "arguments gone", "a method gone"],
)
def test_another_diffusers_than_the_patch_was_written_for_is_refused_with_its_version(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, now: Any, says: str
) -> None:
    unet = sdxl_unet()
    before = snapshot(unet)
    monkeypatch.setattr(kind, name, now)
    with pytest.raises(TypeError, match=rf"diffusers {re.escape(diffusers.__version__)} has another .*{says}"):
        atedm.apply(unet)
    monkeypatch.undo()
    assert snapshot(unet) == before
