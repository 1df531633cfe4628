# ruff: noqa: I001
"""Small random models in ComfyUI's own classes, handed to workflows by nodes that exist in these tests only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import engine  # brings up ComfyUI, so that what follows can be imported

import comfy.model_management as management
import comfy.supported_models
import nodes
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import ModelPatcher

WORDS, POOLED = 48, 24


def sdxl(seed: int = 0, **changes: Any) -> ModelPatcher:
    """SDXL's shape: no attention on the first level, two layers a block on the second, three on the third."""
    settings = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
        "transformer_depth_middle": 3,
        "num_head_channels": 16,
        "context_dim": WORDS,
        "adm_in_channels": 6 * 256 + POOLED,
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    torch.manual_seed(seed)
    model = comfy.supported_models.SDXL(settings | changes).get_model({}, device="cpu")
    torch.manual_seed(seed)
    strong(model.diffusion_model)
    return patcher(model)


def sd1(seed: int = 0) -> ModelPatcher:
    """SD 1.x's shape: one layer a block, convolutions into and out of the blocks."""
    settings = {
        "transformer_depth": [1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "num_classes": None,
    }
    torch.manual_seed(seed)
    base = {"num_heads": 2, "num_head_channels": -1}
    changes = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 2],
        "context_dim": WORDS,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    config = comfy.supported_models.SD15(changes | base | settings)
    config.unet_config.update(base)
    model = config.get_model({}, device="cpu")
    torch.manual_seed(seed)
    strong(model.diffusion_model)
    return patcher(model)


def flux(seed: int = 0, **changes: Any) -> ModelPatcher:
    """FLUX's shape: blocks that hold prompt and image apart, then blocks that hold them as one."""
    settings = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": POOLED,
        "context_in_dim": WORDS,
        "hidden_size": 48,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 4,
        "depth_single_blocks": 5,
        "axes_dim": [4, 10, 10],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "dtype": torch.float32,
    }
    return _transformer(comfy.supported_models.Flux(settings | changes), seed)


def sd3(seed: int = 0, **changes: Any) -> ModelPatcher:
    """SD3.5-medium's shape: some blocks attend within the image, too."""
    context_embedder = {"target": "torch.nn.Linear", "params": {"in_features": WORDS, "out_features": 64 * 4}}
    settings = {
        "in_channels": 16,
        "patch_size": 2,
        "depth": 4,
        "input_size": None,
        "num_patches": 32 * 32,
        "pos_embed_max_size": 32,
        "pos_embed_scaling_factor": None,
        "adm_in_channels": POOLED,
        "context_size": WORDS,
        "context_embedder_config": context_embedder,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0, 1],
        "dtype": torch.float32,
    }
    return _transformer(comfy.supported_models.SD3(settings | changes), seed)


def qwen(seed: int = 0, **changes: Any) -> ModelPatcher:
    """Qwen-Image's shape."""
    settings = {
        "image_model": "qwen_image",
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 5,
        "attention_head_dim": 24,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "axes_dims_rope": (4, 10, 10),
        "dtype": torch.float32,
    }
    return _transformer(comfy.supported_models.QwenImage(settings | changes), seed)


def _transformer(config: Any, seed: int) -> ModelPatcher:
    torch.manual_seed(seed)
    model = config.get_model({}, device="cpu")
    torch.manual_seed(seed)
    for parameter in model.diffusion_model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, 1.0, 0.1)
    draw_places(model.diffusion_model)
    return patcher(model)


def strong(network: nn.Module) -> None:
    """Draw weights: sharp attention and strong blocks, so that which tokens are dropped shows in the output."""
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            if name.endswith((".0.weight", "in_layers.0.weight", "out_layers.0.weight")):
                nn.init.ones_(parameter)
            continue
        gain = 2.5 if name.endswith(("to_q.weight", "to_k.weight")) else 0.05 if name == "out.2.weight" else 1.0
        nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    draw_places(network)


def draw_places(network: nn.Module) -> None:
    """Draw the table of positions, which holds what was in memory until weights are loaded."""
    for name, buffer in network.named_buffers():
        if name.endswith("pos_embed"):
            nn.init.normal_(buffer, std=0.1)


def patcher(model: Any) -> ModelPatcher:
    """Hand a model over as a loader does."""
    model.eval()
    return ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def conditioning(seed: int, words: int = 7) -> list[Any]:
    """What a prompt becomes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(1, words, WORDS, generator=generator),
            {"pooled_output": torch.randn(1, POOLED, generator=generator)},
        ]
    ]


#: What the nodes of these tests give, by name, and what they were given.
SHELF: dict[str, Any] = {}
TAKEN: dict[str, Any] = {}


class FromShelf:
    """Gives what lies on the shelf."""

    FUNCTION = "execute"
    CATEGORY = "test"
    RETURN_TYPES = ("*",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, **_: Any) -> bool:
        return True

    def execute(self, name: str) -> tuple[Any]:
        return (SHELF[name],)


def _giving(kind: str) -> type:
    return type(f"Test{kind}", (FromShelf,), {"RETURN_TYPES": (kind,)})


class Take:
    """Keeps latents, or images, for the test."""

    FUNCTION = "execute"
    CATEGORY = "test"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}, "optional": {"latent": ("LATENT",), "image": ("IMAGE",)}}

    def execute(self, name: str, latent: Any = None, image: Any = None) -> dict[str, Any]:
        TAKEN[name] = image if latent is None else latent["samples"].clone()
        return {}


for kind in ("MODEL", "CONDITIONING", "CONTROL_NET", "SIGMAS", "LATENT"):
    nodes.NODE_CLASS_MAPPINGS[f"Test{kind}"] = _giving(kind)
nodes.NODE_CLASS_MAPPINGS["TestTake"] = Take


def unets_on_the_shelf() -> Iterator[None]:
    """Lay U-Nets and prompts on the shelf for a test, and put all away after it."""
    SHELF.clear()
    SHELF.update(sdxl=sdxl(), sd1=sd1(), positive=conditioning(1), negative=conditioning(2, words=9))
    torch.set_num_threads(1)
    yield
    SHELF.clear()
    TAKEN.clear()
    management.unload_all_models()


def seen_tokens(model: ModelPatcher) -> list[int]:
    """How many tokens the feed-forward of each layer of a U-Net will have seen."""
    seen: list[int] = []
    for module in model.model.modules():
        if isinstance(module, BasicTransformerBlock):
            module.ff.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def workflow(
    model: str = "sdxl",
    *,
    size: tuple[int, int] = (128, 128),
    batch: int = 1,
    pruned: dict[str, Any] | None = None,
    **sampler: Any,
) -> dict[str, Any]:
    """Text to image in the API's format: the model from the shelf, pruned if asked for, and a sampler."""
    prompt = {
        "model": {"class_type": "TestMODEL", "inputs": {"name": model}},
        "positive": {"class_type": "TestCONDITIONING", "inputs": {"name": "positive"}},
        "negative": {"class_type": "TestCONDITIONING", "inputs": {"name": "negative"}},
        "empty": {
            "class_type": "EmptySD3LatentImage" if model in ("flux", "sd3", "qwen") else "EmptyLatentImage",
            "inputs": {"width": size[1], "height": size[0], "batch_size": batch},
        },
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["empty", 0],
                "seed": 3,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            }
            | sampler,
        },
        "take": {"class_type": "TestTake", "inputs": {"name": "out", "latent": ["sampler", 0]}},
    }
    if pruned is not None:
        inputs = {"model": ["model", 0], "method": "matched", "rate": 0.6, "early_strength": 1.0} | pruned
        prompt["pruned"] = {"class_type": "AtedmTokenPruning", "inputs": inputs}
        prompt["sampler"]["inputs"]["model"] = ["pruned", 0]
    return prompt


def draw(running: engine.Engine, prompt: dict[str, Any]) -> Tensor:
    """Run a workflow that must succeed, and give what it took."""
    TAKEN.pop("out", None)
    said = running.run(prompt)
    event, what = said[-1]
    assert event == "execution_success", what.get("exception_message", event)
    return TAKEN["out"]
