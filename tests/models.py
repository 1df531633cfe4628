"""Very small models with random weights, shaped like the real ones."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from atedm.tiny.autoencoder import build_autoencoder
from atedm.tiny.text import WIDTH, build_text_encoders, build_tokenizer

TEXT_WIDTH = 2 * WIDTH


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's shape: no attention on the first level, two layers a block on the second, three on the third."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 48),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 3),
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    return _lively(UNet2DConditionModel(**(config | changes)))


def sd1_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SD 1.x's shape: one layer a block on all levels but the last, convolutions into and out of the blocks."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return _lively(UNet2DConditionModel(**(config | changes)))


def _lively(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Make attention sharp and blocks strong, so that which tokens are dropped shows clearly in the output."""
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            nn.init.normal_(parameter, std=2.5 * parameter.shape[1] ** -0.5)
        elif name.endswith(("to_out.0.weight", "ff.net.2.weight")) or ".attentions." in name and "proj_out" in name:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return unet.eval()


def inputs(
    unet: UNet2DConditionModel, size: tuple[int, int] = (16, 16), batch: int = 2, seed: int = 1
) -> dict[str, Any]:
    """What one call of a U-Net takes besides the timestep."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    call = {"sample": normal(batch, 4, *size), "encoder_hidden_states": normal(batch, 7, TEXT_WIDTH)}
    if unet.config.addition_embed_type == "text_time":
        times = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]).repeat(batch, 1)
        call["added_cond_kwargs"] = {"text_embeds": normal(batch, WIDTH), "time_ids": times}
    return call


@torch.no_grad()
def run(unet: Any, timestep: Any = 1, **changes: Any) -> Tensor:
    """One call of a U-Net; timestep 1 is late, so that every block prunes."""
    plain = getattr(unet, "_orig_mod", unet)
    size, batch, seed = changes.pop("size", (16, 16)), changes.pop("batch", 2), changes.pop("seed", 1)
    return unet(**(inputs(plain, size, batch, seed) | {"timestep": timestep} | changes)).sample


def small_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's shape with as few parts as still have a spared and a pruned block: for what takes long on each of them."""
    small = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "layers_per_block": 1,
    }
    return sdxl_unet(seed, **(small | changes))


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows a few dozen words."""
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def sdxl_pipeline(seed: int = 0, unet: UNet2DConditionModel | None = None) -> StableDiffusionXLPipeline:
    """A whole text-to-image pipeline; 64 px images have 16 x 16 latents."""
    unet = sdxl_unet(seed) if unet is None else unet
    torch.manual_seed(seed)
    text_encoder, text_encoder_2 = build_text_encoders(tokenizer())
    pipe = StableDiffusionXLPipeline(
        vae=build_autoencoder().eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int = 0, **changes: Any) -> Tensor:
    """Draw with a seed and give the latents; ``size`` is (height, width) in pixels."""
    height, width = changes.pop("size", (64, 64))
    options = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    if "image" not in changes or "mask_image" in changes:
        options |= {"height": height, "width": width}
    return pipe(**(options | changes), generator=torch.Generator().manual_seed(seed)).images
