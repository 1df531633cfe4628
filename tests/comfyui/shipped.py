# ruff: noqa: I001
"""The model that ships, in ComfyUI's classes: the same weights in its layout.

Its settings cannot say some things: 16 groups for 32 in norms, 2.5 times the channels on the second level, another
width of heads on each level, and sizes embedded in 16 numbers for 256.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import engine  # noqa: F401 - brings up ComfyUI, so that what follows can be imported

import comfy.ops
import comfy.sample
import comfy.supported_models
import comfy.utils
from comfy.ldm.modules.attention import CrossAttention
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

import small
from atedm.app.models import load_pipeline
from small import SHELF, draw

STEPS, GUIDANCE, SEED = 20, 3.0, 11
PROMPT = "a butterfly above a rose in a green meadow"


SIDE, LATENTS = 256, 64


class Half(int):
    """A number of halves, for a level whose channels are no whole multiple of the first one's."""

    def __mul__(self, other: int) -> int:
        """Multiply by so many halves."""
        return int(self) * int(other) // 2

    __rmul__ = __mul__


class Operations(comfy.ops.disable_weight_init):
    """ComfyUI's layers, with norms of 16 groups."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        """As in the shipped U-Net."""

        def __init__(self, num_groups: int, num_channels: int, **options: Any) -> None:
            super().__init__(num_groups=16, num_channels=num_channels, **options)


def model(unet: Any) -> Any:
    """Put the weights of the shipped U-Net into ComfyUI's."""
    width = unet.config.cross_attention_dim
    settings = {
        "image_size": LATENTS,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, Half(5), 3],
        "transformer_depth": [0, 0, 3, 3, 4, 4],
        "transformer_depth_output": [0, 0, 0, 3, 3, 3, 4, 4, 4],
        "transformer_depth_middle": 4,
        "num_heads": 1,  # the number is set below
        "num_head_channels": -1,
        "context_dim": width,
        "adm_in_channels": unet.config.projection_class_embeddings_input_dim,
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    config = comfy.supported_models.SDXL(settings)
    names = comfy.utils.unet_to_diffusers(settings)
    weights = {names[name]: value.float() for name, value in unet.state_dict().items()}
    config.unet_config.update(settings)
    config.custom_operations = Operations
    config.sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}
    # These two names say how the model was trained: v-prediction, zero terminal SNR.
    made = config.get_model({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, device="cpu")
    made.diffusion_model.load_state_dict(weights)
    heads = dict(zip(unet.config.block_out_channels, unet.config.attention_head_dim, strict=True))
    for module in made.diffusion_model.modules():
        if isinstance(module, CrossAttention):
            module.heads = heads[module.to_q.out_features]
            module.dim_head = module.to_q.out_features // module.heads
    made.embedder = Timestep(unet.config.addition_time_embed_dim)
    return small.patcher(made)


def bring(prompt: str = PROMPT) -> Any:
    """Lay the shipped model, a prompt as its text encoders give it, and its sigmas on the shelf; give its pipeline."""
    pipe = load_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    words, negative, pooled, negative_pooled = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1)
    size = dict.fromkeys(("width", "height", "target_width", "target_height"), SIDE)
    pipe.scheduler.set_timesteps(STEPS)
    SHELF.update(
        shipped=model(pipe.unet),
        positive=[[words, {"pooled_output": pooled} | size]],
        negative=[[negative, {"pooled_output": negative_pooled} | size]],
        sigmas=pipe.scheduler.sigmas.clone(),
        empty={"samples": torch.zeros(1, 4, LATENTS, LATENTS)},
    )
    return pipe


def workflow(pruned: dict[str, Any] | None = None) -> dict[str, Any]:
    """Text to image with the shipped model and its own sigmas."""
    prompt = small.workflow("shipped", pruned=pruned)
    prompt["empty"] = {"class_type": "TestLATENT", "inputs": {"name": "empty"}}
    prompt["sigmas"] = {"class_type": "TestSIGMAS", "inputs": {"name": "sigmas"}}
    prompt["euler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    links = {name: prompt["sampler"]["inputs"][name] for name in ("model", "positive", "negative", "latent_image")}
    prompt["sampler"] = {
        "class_type": "SamplerCustom",
        "inputs": links
        | {"add_noise": True, "noise_seed": SEED, "cfg": GUIDANCE, "sampler": ["euler", 0], "sigmas": ["sigmas", 0]},
    }
    return prompt


@torch.no_grad()
def picture(pipe: Any, running: Any, prompt: dict[str, Any]) -> Tensor:
    """Run a workflow, and decode what it sampled: (3, 256, 256) in [0, 1]."""
    latents = draw(running, prompt) * SHELF["shipped"].model.latent_format.scale_factor
    return decode(pipe, latents)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents as the pipeline samples them."""
    image: Tensor = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (image[0] / 2 + 0.5).clamp(0, 1)


def in_diffusers(pipe: Any) -> Tensor:
    """The same picture, by diffusers."""
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, LATENTS, LATENTS), SEED)
    latents: Tensor = pipe(
        PROMPT, latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent"
    ).images
    return decode(pipe, latents)
