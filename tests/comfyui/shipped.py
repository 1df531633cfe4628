# ruff: noqa: I001
"""The model that ships, in ComfyUI's classes: the same weights in its layout.

Two things its settings cannot say are set on the built model: ComfyUI's group norms have 32 groups, and it embeds sizes
in 256 numbers; here they are 16 and 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import engine  # noqa: F401 - brings up ComfyUI, so that what follows can be imported

import comfy.sample
import comfy.supported_models
import comfy.utils
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

import small
from atedm.app.models import load_pipeline
from small import SHELF, draw

STEPS, GUIDANCE, SEED = 20, 3.0, 11
PROMPT = "a butterfly above a rose in a green meadow"


def model(unet: Any) -> Any:
    """Put the weights of the shipped U-Net into ComfyUI's."""
    width = unet.config.cross_attention_dim
    settings = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 3],
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 4, 4, 4],
        "transformer_depth_middle": 4,
        "num_head_channels": 32,
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
    config.sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}
    # These two names say how the model was trained: v-prediction, zero terminal SNR.
    made = config.get_model({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, device="cpu")
    made.diffusion_model.load_state_dict(weights)
    for module in made.diffusion_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = unet.config.norm_num_groups
    made.embedder = Timestep(unet.config.addition_time_embed_dim)
    return small.patcher(made)


def bring(prompt: str = PROMPT) -> Any:
    """Lay the shipped model, a prompt as its text encoders give it, and its sigmas on the shelf; give its pipeline."""
    pipe = load_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    words, negative, pooled, negative_pooled = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1)
    size = dict.fromkeys(("width", "height", "target_width", "target_height"), 128)
    pipe.scheduler.set_timesteps(STEPS)
    SHELF.update(
        shipped=model(pipe.unet),
        positive=[[words, {"pooled_output": pooled} | size]],
        negative=[[negative, {"pooled_output": negative_pooled} | size]],
        sigmas=pipe.scheduler.sigmas.clone(),
        empty={"samples": torch.zeros(1, 4, 32, 32)},
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
    """Run a workflow, and decode what it sampled: (3, 128, 128) in [0, 1]."""
    latents = draw(running, prompt) * SHELF["shipped"].model.latent_format.scale_factor
    return decode(pipe, latents)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents as the pipeline samples them."""
    image: Tensor = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (image[0] / 2 + 0.5).clamp(0, 1)


def in_diffusers(pipe: Any) -> Tensor:
    """The same picture, by diffusers."""
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 32, 32), SEED)
    latents: Tensor = pipe(
        PROMPT, latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent"
    ).images
    return decode(pipe, latents)
