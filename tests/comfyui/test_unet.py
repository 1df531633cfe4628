# ruff: noqa: I001
"""U-Nets in the real application: workflows through its executor, with the node and without."""

import engine  # first: it skips these where there is no application, and brings it up where there is

import copy
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management as management
import comfy.model_patcher
import comfy.patcher_extension
import folder_paths
import nodes
import pytest
from comfy_api.torch_helpers import set_torch_compile_wrapper
import small
import torch
from safetensors.torch import save_file
from small import SHELF, TAKEN, draw, workflow

import comfyui_standin as standin
from atedm.hosts.comfyui import pruning_of

MODELS = pytest.mark.parametrize("model", ["sdxl", "sd1"])
METHODS = pytest.mark.parametrize("method", ["matched", "AT-EDM", "AT-EDM for few steps"])


@pytest.fixture(autouse=True)
def shelf() -> Iterator[None]:
    SHELF.clear()
    SHELF.update(
        sdxl=small.sdxl(), sd1=small.sd1(), positive=small.conditioning(1), negative=small.conditioning(2, words=9)
    )
    torch.set_num_threads(1)
    yield
    SHELF.clear()
    TAKEN.clear()
    management.unload_all_models()


@pytest.fixture
def running() -> Any:
    return engine.Engine()


def seen_tokens(model: Any) -> tuple[list[int], list[Any]]:
    """Note how many tokens each layer's feed-forward sees."""
    seen: list[int] = []
    hooks = [
        module.ff.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for module in model.model.modules()
        if isinstance(module, attention.BasicTransformerBlock)
    ]
    return seen, hooks


@MODELS
def test_rate_0_changes_no_bit_and_a_second_run_is_equal(running: Any, model: str) -> None:
    dense = draw(running, workflow(model))
    assert torch.equal(draw(running, workflow(model, pruned={"rate": 0.0})), dense)
    pruned = draw(running, workflow(model, pruned={}))
    assert not torch.equal(pruned, dense)
    assert pruned.isfinite().all()
    assert torch.equal(draw(engine.Engine(), workflow(model, pruned={})), pruned)
    assert torch.equal(draw(engine.Engine(), workflow(model)), dense)


@METHODS
def test_layers_run_on_fewer_tokens(running: Any, method: str) -> None:
    seen, _ = seen_tokens(SHELF["sdxl"])
    draw(running, workflow())
    everything = sum(seen)
    assert set(seen) == {64, 16}
    seen.clear()
    draw(running, workflow(pruned={"method": method}))
    assert sum(seen) < everything
    assert min(seen) < 16


def test_at_edm_says_what_works_where_it_cannot(running: Any) -> None:
    said = running.run(workflow("sd1", pruned={"method": "AT-EDM"}))
    event, what = said[-1]
    assert event == "execution_error"
    assert what["node_type"] == "AtedmTokenPruning"
    assert "'matched' works here" in what["exception_message"]


def test_another_model_and_the_model_itself_are_untouched(running: Any) -> None:
    SHELF["other"] = small.sdxl(seed=5)
    before, other = draw(running, workflow()), draw(running, workflow("other"))
    options = copy.deepcopy(SHELF["sdxl"].model_options)
    draw(running, workflow(pruned={}))
    assert torch.equal(draw(engine.Engine(), workflow()), before)
    assert torch.equal(draw(engine.Engine(), workflow("other")), other)
    assert SHELF["sdxl"].object_patches == {}
    assert SHELF["sdxl"].model_options == options
    assert pruning_of(SHELF["sdxl"]) is None
    for kind in (attention.SpatialTransformer, attention.BasicTransformerBlock, attention.CrossAttention):
        assert kind.forward.__module__ == attention.__name__
    management.unload_all_models()
    for module in SHELF["sdxl"].model.modules():
        assert getattr(vars(module).get("forward", module.forward), "__func__", None) is type(module).forward


def test_images_of_different_sizes_in_turn(running: Any) -> None:
    sizes = ((128, 128), (128, 192), (96, 160))
    alone = [draw(engine.Engine(), workflow(pruned={}, size=size)) for size in sizes]
    for size, expected in [*zip(sizes, alone, strict=True)] * 2:
        TAKEN.clear()
        found = draw(engine.Engine() if size == sizes[0] else running, workflow(pruned={}, size=size, seed=3))
        assert torch.equal(found, expected)


def test_each_image_of_a_batch_is_its_own(running: Any) -> None:
    SHELF["sdxl"] = small.sdxl(dtype=torch.float64)  # or rounding grows over the steps, pruned or not
    batch = draw(running, workflow(pruned={}, batch=2))
    assert batch.shape[0] == 2
    assert not torch.equal(batch[0], batch[1])
    # The first of a batch has the noise of an image alone.
    torch.testing.assert_close(draw(running, workflow(pruned={}))[0], batch[0], rtol=1e-4, atol=1e-3)


def test_conditions_together_and_apart_draw_the_same(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    SHELF["sdxl"] = small.sdxl(dtype=torch.float64)
    SHELF["negative"] = small.conditioning(2)  # of one length, so that they go into one batch
    seen, _ = seen_tokens(SHELF["sdxl"])
    together = draw(running, workflow(pruned={}))
    calls = len(seen)
    # No memory for a batch of both, and enough for attention, which asks in its own way.
    monkeypatch.setattr(management, "get_free_memory", lambda _=None, both=False: (2**30, 2**30) if both else 0)
    seen.clear()
    apart = draw(engine.Engine(), workflow(pruned={}))
    assert len(seen) == 2 * calls
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_sde", "dpm_2_ancestral", "uni_pc", "lcm"])
def test_samplers(running: Any, sampler: str) -> None:
    assert draw(running, workflow(pruned={}, sampler_name=sampler, scheduler="karras")).isfinite().all()


def test_beside_freeu_areas_and_inpainting_all_blocks_are_pruned(
    running: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = workflow(pruned={}, size=(128, 192))
    freeu = {"model": ["model", 0], "b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
    prompt["freeu"] = {"class_type": "FreeU_V2", "inputs": freeu}
    prompt["pruned"]["inputs"]["model"] = ["freeu", 0]
    area = {"conditioning": ["negative", 0], "width": 96, "height": 64, "x": 32, "y": 64, "strength": 1.0}
    prompt["area"] = {"class_type": "ConditioningSetArea", "inputs": area}
    both = {"conditioning_1": ["positive", 0], "conditioning_2": ["area", 0]}
    prompt["both"] = {"class_type": "ConditioningCombine", "inputs": both}
    prompt["sampler"]["inputs"]["positive"] = ["both", 0]
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 192, "height": 64}}
    prompt["inpaint"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["empty", 0], "mask": ["mask", 0]}}
    prompt["sampler"]["inputs"]["latent_image"] = ["inpaint", 0]
    seen, _ = seen_tokens(SHELF["sdxl"])
    with caplog.at_level(logging.WARNING, "atedm"):
        first = draw(running, prompt)
    assert first.isfinite().all()
    assert not [record for record in caplog.records if record.name == "atedm"]
    assert not {96, 24} & set(seen)
    assert torch.equal(draw(engine.Engine(), prompt), first)


class Compile:
    """As the node that compiles a model, with a compiler that changes no number and takes little time."""

    FUNCTION, CATEGORY, RETURN_TYPES = "execute", "test", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def execute(self, model: Any) -> tuple[Any]:
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="eager")
        return (clone,)


def test_a_compiled_model_draws_the_same(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Compile", Compile)
    shape = {"transformer_depth": [0, 0, 0, 0, 0, 2], "transformer_depth_output": [0] * 9}
    SHELF["sdxl"] = small.sdxl(dtype=torch.float64, **shape, transformer_depth_middle=0)
    prompt = workflow(pruned={}, steps=2)
    plain = draw(running, prompt)
    prompt["compile"] = {"class_type": "Compile", "inputs": {"model": ["pruned", 0]}}
    prompt["sampler"]["inputs"]["model"] = ["compile", 0]
    torch.testing.assert_close(draw(running, prompt), plain, rtol=1e-5, atol=1e-5)


def test_image_to_image_prunes_as_late_steps_do(running: Any) -> None:
    seen, _ = seen_tokens(SHELF["sdxl"])
    draw(running, workflow(pruned={"early_strength": 0.0}, denoise=0.5, steps=2))
    late = set(seen)
    seen.clear()
    draw(running, workflow(pruned={"early_strength": 0.0}, steps=2))
    assert 64 not in late
    assert 64 in seen


def test_lora_and_controlnet_beside(running: Any, tmp_path: Any) -> None:
    layer = SHELF["sdxl"].model.diffusion_model.input_blocks[4][1].transformer_blocks[0]
    width = layer.attn1.to_q.weight.shape[0]
    name = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.randn(2, width), f"{name}.lora_up.weight": torch.randn(width, 2)},
        tmp_path / "strong.safetensors",
    )
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    plain = draw(running, workflow(pruned={}))
    for lora_first in (True, False):
        prompt = workflow(pruned={})
        lora = {"lora_name": "strong.safetensors", "strength_model": 1.0}
        before, after = ("model", "pruned") if lora_first else ("pruned", "sampler")
        prompt["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": lora | {"model": [before, 0]}}
        prompt[after]["inputs"]["model"] = ["lora", 0]
        found = draw(running, prompt)
        assert not torch.equal(found, plain)
        if lora_first:
            first = found
    assert torch.equal(found, first)  # in whichever order the two nodes stand
    assert torch.equal(draw(engine.Engine(), workflow(pruned={})), plain)  # and it is gone without its node


def controlnet() -> Any:
    settings = dict(SHELF["sdxl"].model.model_config.unet_config)
    for name in ("out_channels", "transformer_depth_output", "use_temporal_attention"):
        settings.pop(name)
    model = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3, operations=comfy.ops.disable_weight_init)
    small.strong(model)
    return comfy.controlnet.ControlNet(
        model, load_device=management.get_torch_device(), manual_cast_dtype=None, compression_ratio=8
    )


def test_a_controlnet_guides_a_pruned_unet(running: Any) -> None:
    SHELF["control"] = controlnet()
    seen, _ = seen_tokens(SHELF["sdxl"])
    prompt = workflow(pruned={})
    prompt["control"] = {"class_type": "TestCONTROL_NET", "inputs": {"name": "control"}}
    prompt["hint"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 128, "height": 128, "batch_size": 1, "color": 255},
    }
    prompt["apply"] = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "control_net": ["control", 0],
            "image": ["hint", 0],
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
    }
    prompt["sampler"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    guided = draw(running, prompt)
    assert 64 not in seen  # its residuals are added between blocks, where all tokens are back
    assert not torch.equal(guided, draw(running, workflow(pruned={})))
    assert guided.isfinite().all()


@pytest.mark.parametrize(
    ("node", "inputs", "what"),
    [
        ("PerturbedAttentionGuidance", {"scale": 3.0}, "replaces its attention (attn1)"),
        ("TomePatchModel", {"ratio": 0.3}, "patches attention (attn1_patch)"),
        ("HyperTile", {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}, "attn1_patch"),
    ],
)
def test_beside_nodes_that_change_attention_blocks_are_dense(
    running: Any, caplog: pytest.LogCaptureFixture, node: str, inputs: dict[str, Any], what: str
) -> None:
    for order in (("model", "pruned"), ("pruned", "sampler")):
        prompt = workflow(pruned={})
        prompt["other"] = {"class_type": node, "inputs": inputs | {"model": [order[0], 0]}}
        prompt[order[1]]["inputs"]["model"] = ["other", 0]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "atedm"):
            assert draw(running, prompt).isfinite().all()
        lines = [record.message for record in caplog.records if "is left dense" in record.message]
        assert lines
        assert all(what in line for line in lines)
        assert len(lines) == len(set(lines))


@METHODS
def test_cancel_in_the_middle(running: Any, method: str) -> None:
    first = draw(running, workflow(pruned={"method": method}))
    layer = SHELF["sdxl"].model.diffusion_model.middle_block[1].transformer_blocks[1]
    times = iter(range(100))

    def cancel(*_: Any) -> None:
        if next(times) == 3:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    hook = layer.ff.register_forward_hook(cancel)
    assert running.run(workflow(pruned={"method": method}, seed=4))[-1][0] == "execution_interrupted"
    hook.remove()
    assert torch.equal(draw(engine.Engine(), workflow(pruned={"method": method})), first)


def test_kept_tokens_are_shown(running: Any) -> None:
    prompt = workflow(pruned={}, batch=2, size=(128, 192))
    prompt["kept"] = {
        "class_type": "AtedmKeptTokens",
        "inputs": {"model": ["pruned", 0], "samples": ["sampler", 0], "block": 0, "step": -1},
    }
    prompt["take"]["inputs"] = {"name": "out", "image": ["kept", 0]}
    shares = draw(running, prompt)
    assert shares.shape[0] == 2
    assert shares.shape[1] / shares.shape[2] == 128 / 192
    prompt["kept"]["inputs"] |= {"step": 1, "block": 999}
    step = draw(running, prompt)
    assert set(step.unique().tolist()) == {0.0, 1.0}
    prompt["white"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 192, "height": 128, "batch_size": 2, "color": 0xFFFFFF},
    }
    prompt["kept"]["inputs"]["image"] = ["white", 0]
    over = draw(running, prompt)
    assert over.shape == (2, 128, 192, 3)
    assert over.min() == pytest.approx(0.15)
    assert over.max() == 1


def test_kept_tokens_say_what_is_missing(running: Any) -> None:
    prompt = workflow()
    prompt["kept"] = {
        "class_type": "AtedmKeptTokens",
        "inputs": {"model": ["model", 0], "samples": ["sampler", 0], "block": 0, "step": -1},
    }
    prompt["take"]["inputs"] = {"name": "out", "image": ["kept", 0]}
    said = running.run(prompt)
    assert "not pruned" in said[-1][1]["exception_message"]


def test_the_stand_in_has_the_signatures_of_the_application() -> None:
    pairs = [
        (standin.CrossAttention.forward, attention.CrossAttention.forward),
        (standin.BasicTransformerBlock.forward, attention.BasicTransformerBlock.forward),
        (standin.SpatialTransformer.forward, attention.SpatialTransformer.forward),
        (standin.UNetModel.forward, openaimodel.UNetModel.forward),
        *(
            (getattr(standin.ModelPatcher, name), getattr(comfy.model_patcher.ModelPatcher, name))
            for name in ("clone", "add_object_patch", "get_model_object", "set_attachments", "get_attachment")
        ),
        (standin.BaseModel.apply_model, comfy.model_base.BaseModel.apply_model),
        (standin.ModelPatcher.add_wrapper_with_key, comfy.model_patcher.ModelPatcher.add_wrapper_with_key),
    ]
    for ours, theirs in pairs:
        names = [[*inspect.signature(function).parameters] for function in (ours, theirs)]
        assert names[0] == names[1], theirs
    outer = inspect.signature(comfy.samplers.CFGGuider.outer_sample).parameters
    assert [*outer][:5] == ["self", "noise", "latent_image", "sampler", "sigmas"]
    assert comfy.patcher_extension.WrappersMP.OUTER_SAMPLE == "outer_sample"
    assert comfy.patcher_extension.WrappersMP.APPLY_MODEL == "apply_model"
