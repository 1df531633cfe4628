"""A patched U-Net is still the same U-Net: it is copied, saved, trained, adapted and offloaded like any other."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from diffusers import (
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import atedm
from atedm import METHODS, AtEdm
from atedm.method.contract import Method
from models import (
    EARLY,
    LATE,
    TEXT_WIDTH,
    distance,
    draw,
    importance,
    inputs,
    run,
    sd1_unet,
    sdxl_pipeline,
    sdxl_unet,
    small_unet,
    snapshot,
)

# In double precision; another token kept differs by 0.1 and more.
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def pruned_output(build: Callable[[], UNet2DConditionModel] = sdxl_unet) -> Tensor:
    unet = build()
    atedm.apply(unet, "paper")
    return run(unet)


# --- copies -----------------------------------------------------------------------------------------------------------


def through_pickle(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return pickle.loads(pickle.dumps(unet))


def through_torch_save(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    torch.save(unet, folder / "unet.pt")
    return torch.load(folder / "unet.pt", weights_only=False)


@pytest.mark.parametrize("method", ["paper", "matched"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_its_own_weights_and_its_own_patch(way: str, method: str, tmp_path: Path) -> None:
    unet = small_unet()
    dense = run(unet)
    atedm.apply(unet, method)
    early, late = run(unet, EARLY), run(unet, LATE)
    make = {"deepcopy": copy.deepcopy, "pickle": through_pickle}.get(way, lambda u: through_torch_save(u, tmp_path))
    twin = make(unet)
    assert torch.equal(run(twin, EARLY), early)
    assert torch.equal(run(twin, LATE), late)
    # The step of one is not the step of the other.
    run(unet, EARLY)
    assert torch.equal(run(twin, LATE), late)
    # Nor is a weight, also where only the ranking reads it.
    with torch.no_grad():
        twin.get_submodule("down_blocks.1.attentions.0").transformer_blocks[0].attn1.to_q.weight.normal_()
    changed = run(twin)
    assert distance(changed, late) > 0.1
    assert torch.equal(run(unet), late)
    # Nor an observer, nor the patch itself.
    seen: list[Any] = []
    with atedm.observed(twin, seen.append):
        run(unet)
    assert seen == []
    atedm.remove(twin)
    assert atedm.is_applied(unet)
    assert torch.equal(run(unet), late)
    assert not any("atedm" in key for module in twin.modules() for key in vars(module))
    hooks = [value for name, value in vars(twin).items() if name.startswith("_forward_")]
    assert len(hooks) >= 5
    assert not any(hooks)
    atedm.remove(unet)
    assert torch.equal(run(unet), dense)


def test_a_copy_of_a_pipeline_is_patched_and_removed_on_its_own() -> None:
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, "paper")
    image = draw(pipe)
    twin = copy.deepcopy(pipe)
    atedm.remove(pipe)
    assert torch.equal(draw(twin), image)
    assert not torch.equal(draw(pipe), image)


def test_pipelines_that_share_a_unet_share_the_patch() -> None:
    pipe = sdxl_pipeline(small_unet())
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    atedm.apply(pipe, "paper")
    assert atedm.is_applied(other)
    atedm.remove(other)
    assert not atedm.is_applied(pipe)
    atedm.apply(pipe, "paper")
    another = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    assert another.unet is pipe.unet
    assert atedm.is_applied(another)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_state_dict_has_no_new_keys_and_loads_both_ways() -> None:
    unet, plain = sdxl_unet(seed=0), sdxl_unet(seed=1)
    before = unet.state_dict()
    atedm.apply(unet, "paper")
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in plain.named_modules()]
    plain.load_state_dict(after)
    unet.load_state_dict(sdxl_unet(seed=2).state_dict())
    atedm.remove(unet)
    assert torch.equal(run(plain), run(sdxl_unet(seed=0)))
    assert torch.equal(run(unet), run(sdxl_unet(seed=2)))


def test_a_patched_model_is_saved_like_an_unpatched_one(tmp_path: Path) -> None:
    pipe = sdxl_pipeline(small_unet())
    dense = draw(pipe)
    pipe.save_pretrained(tmp_path / "plain")
    atedm.apply(pipe, "paper")
    pipe.save_pretrained(tmp_path / "patched")
    pipe.unet.save_pretrained(tmp_path / "patched" / "unet")
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert Path("unet/config.json") in files
    for file in files:
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    opened = DiffusionPipeline.from_pretrained(tmp_path / "patched")
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionXLPipeline
    assert not atedm.is_applied(opened)
    assert torch.equal(draw(opened), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype: torch.dtype) -> None:
    unet = small_unet().to(dtype)
    dense = run(unet)
    for method in ("paper", "matched"):
        with atedm.pruned(unet, method):
            output = run(unet)
        assert output.dtype == dtype
        assert torch.isfinite(output).all()
        assert distance(output, dense) > 0.1


def test_autocast_runs() -> None:
    unet = small_unet()
    for method in ("paper", "matched"):
        with atedm.pruned(unet, method):
            single = run(unet)
            with torch.autocast("cpu", torch.bfloat16):
                output = run(unet)
        assert torch.isfinite(output).all()
        assert 0 < (output - single).std() < 0.7 * single.std()


def test_logits_beyond_half_precision_are_ranked_where_the_model_says_upcast() -> None:
    unet = small_unet(upcast_attention=True).half()
    unet.set_attn_processor(AttnProcessor())
    for name, parameter in unet.named_parameters():
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            parameter.data.mul_(200)
    assert torch.isfinite(run(unet)).all()
    atedm.apply(unet, "paper")
    for ranked in importance(unet).values():
        assert torch.isfinite(ranked).all()
    assert torch.isfinite(run(unet)).all()


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(unet: UNet2DConditionModel, timestep: int = LATE) -> dict[str, Tensor]:
    unet.zero_grad(set_to_none=True)
    unet(**inputs(unet), timestep=timestep).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("timestep", [EARLY, LATE])
@pytest.mark.parametrize("method", ["paper", "matched"])
def test_checkpointing_gives_the_same_gradients(method: str, timestep: int) -> None:
    unet = small_unet()
    dense = gradients(unet, timestep)
    atedm.apply(unet, method)
    plain = gradients(unet, timestep)
    unet.enable_gradient_checkpointing()
    runs = []
    layer = unet.get_submodule("mid_block.attentions.0").transformer_blocks[1]
    hook = layer.norm1.register_forward_hook(lambda *_: runs.append(1))
    checkpointed = gradients(unet, timestep)
    hook.remove()
    assert len(runs) == 2  # once more in the backward pass
    names = {name for name, _ in unet.named_parameters()}
    assert plain.keys() == checkpointed.keys() == dense.keys() == names
    assert all(torch.equal(plain[name], checkpointed[name]) for name in names)
    assert all(plain[name].isfinite().all() for name in names)
    assert any(distance(plain[name], dense[name]) > 0.1 * dense[name].abs().max() for name in names)
    output = run(unet)
    unet.disable_gradient_checkpointing()
    assert torch.equal(run(unet), output)


def test_the_gradient_is_that_of_the_pruned_model() -> None:
    unet = small_unet().double()
    atedm.apply(unet, "paper")
    name = "mid_block.attentions.0.transformer_blocks.1.ff.net.2.bias"
    bias = unet.get_parameter(name)
    gradient = gradients(unet)[name]

    def loss(change: Tensor) -> float:
        with torch.no_grad():
            bias.add_(change)
            value = float(run(unet).square().mean())
            bias.sub_(change)
        return value

    direction = torch.randn_like(bias)
    slope = (loss(1e-5 * direction) - loss(-1e-5 * direction)) / 2e-5
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-4)


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_the_ranking_keeps_nothing_for_the_backward_pass(method: str) -> None:
    unet = small_unet()
    atedm.apply(unet, method)
    seen: list[atedm.Observation] = []
    with atedm.observed(unet, seen.append):
        unet(**inputs(unet), timestep=LATE)
    assert seen
    assert not any(one.importance.requires_grad for one in seen)


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights="gaussian")


def fill_lora(unet: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("order", ["apply first", "adapter first"])
def test_a_lora_is_seen_by_the_ranking(order: str) -> None:
    unet = sdxl_unet().double()
    if order == "apply first":
        atedm.apply(unet, "paper")
        unet.add_adapter(lora())
    else:
        unet.add_adapter(lora())
        atedm.apply(unet, "paper")
    fill_lora(unet.double())
    ranked, output = importance(unet), run(unet)
    # What the adapter comes to, written into the weights of a plain model.
    merged = sdxl_unet().double()
    with torch.no_grad():
        for name, module in unet.named_modules():
            if hasattr(module, "lora_A"):
                change = module.lora_B["default"].weight @ module.lora_A["default"].weight
                merged.get_submodule(name).weight.add_(change)
    atedm.apply(merged, "paper")
    for name, expected in importance(merged).items():
        torch.testing.assert_close(ranked[name], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(output, run(merged), **CLOSE)
    plain = sdxl_unet().double()
    atedm.apply(plain, "paper")
    assert any(distance(ranked[name], value) > 0.1 * value.max() for name, value in importance(plain).items())
    # Not to the bit: another place in memory is enough for some CPUs to round a product otherwise.
    unet.disable_adapters()
    torch.testing.assert_close(run(unet), run(plain), **CLOSE)
    unet.enable_adapters()
    assert torch.equal(run(unet), output)
    unet.delete_adapters("default")
    torch.testing.assert_close(run(unet), run(plain), **CLOSE)
    atedm.remove(unet)
    torch.testing.assert_close(run(unet), run(sdxl_unet().double()), **CLOSE)


def test_a_lora_file_is_loaded_into_a_patched_pipeline_and_unloaded(tmp_path: Path) -> None:
    trained = small_unet()
    trained.add_adapter(lora())
    fill_lora(trained)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe, "paper")
    plain, plain_importance = draw(pipe), importance(pipe.unet)["mid_block.attentions.0"]
    pipe.load_lora_weights(tmp_path)
    adapted, adapted_importance = draw(pipe), importance(pipe.unet)["mid_block.attentions.0"]
    assert distance(adapted, plain) > 0.1
    assert distance(adapted_importance, plain_importance) > 0.1 * plain_importance.max()
    # The scale of a call reaches the ranking too.
    off = importance(pipe.unet, cross_attention_kwargs={"scale": 0.0})["mid_block.attentions.0"]
    torch.testing.assert_close(off, plain_importance)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    atedm.remove(pipe)
    dense = draw(sdxl_pipeline(small_unet()))
    assert torch.equal(draw(pipe), dense)


def by_words(view: atedm.View) -> Tensor:
    q, k, scale = view.cross_attention()
    return torch.softmax(scale * q.float() @ k.float().mT, -1).square().sum(-1).mean(1)


def add_ip_adapter(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Load an IP-Adapter as diffusers' loaders do, and return the picture that prompts."""
    generator = torch.Generator().manual_seed(3)
    width, tokens = 12, 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    projection = {
        "proj.weight": normal(tokens * TEXT_WIDTH, width),
        "proj.bias": normal(tokens * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    keys = {}
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross):
        channels = unet.get_submodule(name.removesuffix(".processor")).query_dim
        for part in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * number + 1}.{part}.weight"] = normal(channels, TEXT_WIDTH) * TEXT_WIDTH**-0.5
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}], low_cpu_mem_usage=False)
    return {"image_embeds": [normal(2, 1, width)]}


@pytest.mark.parametrize("order", ["apply first", "adapter first"])
@pytest.mark.parametrize("method", [AtEdm(), AtEdm(rank=by_words)], ids=["paper", "cross-attention"])
def test_an_ip_adapter_takes_part(order: str, method: Method) -> None:
    unet = small_unet()
    if order == "apply first":
        atedm.apply(unet, method)
        picture = add_ip_adapter(unet)
    else:
        picture = add_ip_adapter(unet)
        atedm.apply(unet, method)
    call = inputs(unet)
    call["added_cond_kwargs"] |= picture

    def output(timestep: int = LATE, **changes: Any) -> Tensor:
        return run(unet, timestep, **(call | changes))

    def scale(value: float) -> None:
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [value]

    pruned = output()
    scale(0.0)
    assert distance(output(), pruned) > 0.1
    plain = small_unet()
    atedm.apply(plain, method)
    torch.testing.assert_close(output(), run(plain), rtol=0.0, atol=1e-3)
    scale(1.0)
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}}
    with pytest.raises(ValueError, match="ip_adapter_masks"):
        output(**masks)
    atedm.remove(unet)
    assert distance(output(), pruned) > 0.1
    output(**masks)


# --- attention --------------------------------------------------------------------------------------------------------


def test_fused_projections_give_the_same() -> None:
    unet = sdxl_unet().double()
    atedm.apply(unet, "paper")
    plain = run(unet)
    unet.fuse_qkv_projections()
    assert "Fused" in type(next(iter(unet.attn_processors.values()))).__name__
    torch.testing.assert_close(run(unet), plain, **CLOSE)
    unet.unfuse_qkv_projections()
    assert torch.equal(run(unet), plain)


@pytest.mark.parametrize("method", METHODS)
def test_attention_processors_and_slices_give_the_same(method: str) -> None:
    unet = sdxl_unet().double()
    atedm.apply(unet, method)
    outputs = []
    for change in (
        lambda: unet.set_attn_processor(AttnProcessor2_0()),
        lambda: unet.set_attn_processor(AttnProcessor()),
        lambda: unet.set_attention_slice("max"),
        lambda: unet.set_attention_slice(1),
    ):
        change()
        outputs.append(run(unet))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slices", [False, True])
def test_attention_that_is_upcast_takes_the_bias_of_matched_pruning(slices: bool, dtype: torch.dtype) -> None:
    """As in SD 2.1, with a processor that makes the logits itself."""
    unet = sd1_unet(upcast_attention=True, use_linear_projection=True).to(dtype)
    if slices:
        unet.set_attention_slice(1)
    else:
        unet.set_attn_processor(AttnProcessor())
    dense = run(unet)
    with atedm.pruned(unet, "matched"):
        pruned = run(unet)
    assert pruned.dtype == dtype
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, dense)
    if dtype == torch.float32:
        unet.set_attn_processor(AttnProcessor2_0())
        with atedm.pruned(unet, "matched"):
            torch.testing.assert_close(run(unet), pruned, rtol=1e-3, atol=1e-3)


# --- offload ----------------------------------------------------------------------------------------------------------


def offload_each_layer(unet: UNet2DConditionModel) -> Callable[[], None]:
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    assert next(unet.parameters()).is_meta
    return lambda: remove_hook_from_submodules(unet)


def offload_the_model(unet: UNet2DConditionModel) -> Callable[[], None]:
    _, hook = accelerate.cpu_offload_with_hook(unet, execution_device="cpu")
    return hook.remove  # type: ignore[no-any-return]


def offload_groups(unet: UNet2DConditionModel) -> Callable[[], None]:
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    return lambda: None


OFFLOADS = [offload_each_layer, offload_the_model, offload_groups]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("method", ["paper", "matched"])
def test_an_offloaded_model_is_patched_before_or_after(offload: Any, method: str) -> None:
    plain = small_unet()
    dense = run(plain)
    atedm.apply(plain, method)
    pruned = run(plain)
    after = small_unet()
    atedm.apply(after, method)
    bring_back_after = offload(after)
    before = small_unet()
    bring_back_before = offload(before)
    atedm.apply(before, method)
    for unet, bring_back in ((after, bring_back_after), (before, bring_back_before)):
        assert torch.equal(run(unet), pruned)
        atedm.remove(unet)
        assert torch.equal(run(unet), dense)
        bring_back()
        assert torch.equal(run(unet), dense)
        atedm.apply(unet, method)
        assert torch.equal(run(unet), pruned)


def test_hooks_laid_over_a_patched_block_let_it_be_removed() -> None:
    unet = sdxl_unet()
    dense = run(unet)
    atedm.apply(unet, "paper")
    pruned = run(unet)
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(run(unet), pruned)
    atedm.remove(unet)
    assert torch.equal(run(unet), dense)
    remove_hook_from_submodules(unet)
    assert torch.equal(run(unet), dense)


@pytest.mark.parametrize("first", ["apply", "offload"])
def test_a_pipeline_offloads_its_models(first: str) -> None:
    pipe = sdxl_pipeline(small_unet())
    dense = draw(pipe)
    atedm.apply(pipe, "paper")
    pruned = draw(pipe)
    if first == "offload":
        atedm.remove(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        atedm.apply(pipe, "paper")
    assert torch.equal(draw(pipe), pruned)
    atedm.remove(pipe)
    assert torch.equal(draw(pipe), dense)
    pipe.remove_all_hooks()
    atedm.apply(pipe, "paper")
    assert torch.equal(draw(pipe), pruned)


def test_layers_stored_in_eight_bits_are_cast_for_the_ranking_too() -> None:
    unet = small_unet()
    atedm.apply(unet, "paper")
    plain = importance(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = unet.get_submodule("mid_block.attentions.0").transformer_blocks[0].attn1.to_q.weight
    assert stored.dtype == torch.float8_e4m3fn
    ranked = importance(unet, **inputs(small_unet()))
    for name, value in plain.items():
        assert 0 < distance(ranked[name], value) < value.max()


def test_a_patched_model_on_another_device_dtype_or_mode_stays_patched() -> None:
    unet = small_unet()
    before = snapshot(unet)
    atedm.apply(unet, "paper")
    moved = unet.to("meta").to_empty(device="cpu").to(torch.bfloat16).train().eval().requires_grad_(False)
    assert atedm.is_applied(moved)
    atedm.remove(moved)
    assert {name: kind for name, (kind, _) in snapshot(moved).items()} == {
        name: kind for name, (kind, _) in before.items()
    }


class Wrapper(nn.Module):
    """A module around a U-Net, as trainers have it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


def test_a_unet_runs_pruned_inside_another_module() -> None:
    unet = small_unet()
    atedm.apply(unet, "paper")
    wrapped = Wrapper(unet)
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs(unet), timestep=LATE).sample, pruned_output(small_unet))
