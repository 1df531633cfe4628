# ruff: noqa: I001
"""Token pruning of U-Nets beside other nodes, in the real application."""

import engine  # first: it skips these where there is no application, and brings it up where there is

import logging
from collections.abc import Iterator
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
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
from small import SHELF, draw, seen_tokens, workflow


@pytest.fixture(autouse=True)
def shelf() -> Iterator[None]:
    yield from small.unets_on_the_shelf()


@pytest.fixture
def running() -> Any:
    return engine.Engine()


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
    seen = seen_tokens(SHELF["sdxl"])
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
    seen = seen_tokens(SHELF["sdxl"])
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
