"""Pipelines of transformers, with small random weights: lines of docs/reference/support.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from atedm.tiny.text import TOKENS
from models import tokenizer
from transformers_of import TEXT, transformer

Made = tuple[Any, Callable[[], Tensor]]


def autoencoder(channels: int = 4) -> AutoencoderKL:
    """Of a factor of 8, as the real ones have."""
    torch.manual_seed(8)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        layers_per_block=1,
        shift_factor=0.0,
    ).eval()


def text(batch: int = 1, tokens: int = TEXT, width: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def pipeline(kind: str, model: Any, **parts: Any) -> Any:
    """Put a pipeline together; text encoders and tokenizers are left out, since captions come as embeddings."""
    made = getattr(diffusers, kind)
    given = {
        "transformer": model,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder(),
    } | parts
    wanted = inspect.signature(made.__init__).parameters
    missing = {name: None for name, p in wanted.items() if name != "self" and p.default is inspect.Parameter.empty}
    pipe = made(**missing | {name: part for name, part in given.items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **changes: Any) -> Tensor:
    """Draw a picture of 128 x 128 pixels and give its latents."""
    options = {"num_inference_steps": 4, "output_type": "latent", "height": 128, "width": 128} | changes
    returned = pipe(**options, generator=torch.Generator().manual_seed(0))
    found = getattr(returned, "images", None)
    found = returned.frames if found is None else found
    latents: Tensor = torch.stack(list(found)) if isinstance(found, list) else found
    return latents


def drawing(pipe: Any, **given: Any) -> Made:
    return pipe, partial(draw, pipe, **given)


GUIDED = {"prompt_embeds": text(), "negative_prompt_embeds": text(seed=4), "guidance_scale": 3.0}


def stable_diffusion_3(**changes: Any) -> Made:
    pooled = {"pooled_prompt_embeds": text()[:, 0], "negative_pooled_prompt_embeds": text(seed=4)[:, 0]}
    return drawing(
        pipeline("StableDiffusion3Pipeline", transformer("SD3Transformer2DModel", **changes)), **GUIDED, **pooled
    )


def pixart() -> Made:
    pipe = pipeline("PixArtSigmaPipeline", transformer("PixArtTransformer2DModel"))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    masks = {"prompt_attention_mask": torch.ones(1, TEXT), "negative_prompt_attention_mask": torch.ones(1, TEXT)}
    return drawing(pipe, **GUIDED, **masks, negative_prompt=None, use_resolution_binning=False)


FLUX_TEXT = {"prompt_embeds": text(), "pooled_prompt_embeds": text()[:, 0]}


def flux(kind: str = "FluxPipeline", channels: int = 16, guidance: bool = True, **given: Any) -> Made:
    model = transformer("FluxTransformer2DModel", in_channels=channels, out_channels=16, guidance_embeds=guidance)
    pipe = pipeline(kind, model)
    return drawing(pipe, **FLUX_TEXT, **given)


def picture() -> Tensor:
    return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(7))


def qwen() -> Made:
    masks = {"prompt_embeds_mask": torch.ones(1, TEXT), "negative_prompt_embeds_mask": torch.ones(1, TEXT)}
    pipe = pipeline("QwenImagePipeline", transformer("QwenImageTransformer2DModel"), vae=None)
    given = {name: value for name, value in GUIDED.items() if name != "guidance_scale"}
    return drawing(pipe, **given, **masks, true_cfg_scale=3.0)


def z_image() -> Made:
    pipe = pipeline("ZImagePipeline", transformer("ZImageTransformer2DModel"))
    return drawing(pipe, prompt_embeds=[text()[0]], negative_prompt_embeds=[text(seed=4)[0]], guidance_scale=3.0)


def chroma() -> Made:
    pipe = pipeline("ChromaPipeline", transformer("ChromaTransformer2DModel", in_channels=16))
    masks = {"prompt_attention_mask": torch.ones(1, TEXT), "negative_prompt_attention_mask": torch.ones(1, TEXT)}
    return drawing(pipe, **GUIDED, **masks)


def wan() -> Made:
    pipe = pipeline("WanPipeline", transformer("WanTransformer3DModel"), vae=None)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    return drawing(pipe, **GUIDED, num_frames=5)


def aura_flow() -> Made:
    pipe = pipeline("AuraFlowPipeline", transformer("AuraFlowTransformer2DModel"))
    masks = {"prompt_attention_mask": torch.ones(1, TEXT), "negative_prompt_attention_mask": torch.ones(1, TEXT)}
    return drawing(pipe, **GUIDED, **masks)


def cog_view() -> Made:
    pipe = pipeline("CogView4Pipeline", transformer("CogView4Transformer2DModel"))
    return drawing(pipe, **GUIDED)


def flux_kontext() -> Made:
    model = transformer("FluxTransformer2DModel", in_channels=16, guidance_embeds=True)
    pipe = pipeline("FluxKontextPipeline", model)
    return drawing(pipe, **FLUX_TEXT, image=picture(), max_area=128 * 128, _auto_resize=False)


def flux_fill() -> Made:
    model = transformer("FluxTransformer2DModel", in_channels=16 + 16 + 256, out_channels=16, guidance_embeds=True)
    half = torch.zeros(1, 1, 128, 128)
    half[..., 64:] = 1
    return drawing(pipeline("FluxFillPipeline", model), **FLUX_TEXT, image=picture(), mask_image=half)


def flux_2() -> Made:
    pipe = pipeline("Flux2Pipeline", transformer("Flux2Transformer2DModel", in_channels=16), vae=flux_2_autoencoder())
    return drawing(pipe, prompt_embeds=text())


def flux_2_autoencoder() -> Any:
    torch.manual_seed(8)
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    ).eval()


def hunyuan() -> Made:
    pipe = pipeline(
        "HunyuanImagePipeline", transformer("HunyuanImageTransformer2DModel", text_embed_2_dim=12), vae=None
    )
    masks = {"prompt_embeds_mask": torch.ones(1, TEXT), "prompt_embeds_mask_2": torch.ones(1, TEXT)}
    return drawing(pipe, prompt_embeds=text(), prompt_embeds_2=text(), **masks, height=256, width=256)


def ltx() -> Made:
    pipe = pipeline("LTXPipeline", transformer("LTXVideoTransformer3DModel"), vae=None)
    masks = {"prompt_attention_mask": torch.ones(1, TEXT), "negative_prompt_attention_mask": torch.ones(1, TEXT)}
    return drawing(pipe, **GUIDED, **masks, height=256, width=256, num_frames=9)


def cog_video() -> Made:
    pipe = pipeline("CogVideoXPipeline", transformer("CogVideoXTransformer3DModel", sample_frames=5), vae=None)
    pipe.scheduler = diffusers.CogVideoXDDIMScheduler()
    return drawing(pipe, **GUIDED, num_frames=5)


def whole_stable_diffusion_3() -> Any:
    """SD 3 with text encoders and tokenizers, so that it can be saved and opened like any."""
    words = tokenizer()
    shape = {"vocab_size": len(words), "hidden_size": 6, "projection_dim": 6, "num_attention_heads": 2}
    ends = {f"{end}_token_id": getattr(words, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = CLIPTextConfig(**shape, **ends, intermediate_size=12, num_hidden_layers=2, max_position_embeddings=TOKENS)
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=12, d_kv=6, d_ff=12, num_layers=1, num_heads=2))
    return pipeline(
        "StableDiffusion3Pipeline",
        transformer("SD3Transformer2DModel"),
        text_encoder=CLIPTextModelWithProjection(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        text_encoder_3=t5.eval(),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=words,
    )


#: What users call it, the pipeline, and a note.
TRANSFORMERS: tuple[tuple[str, Callable[[], Made], str], ...] = (
    ("SD 3", partial(stable_diffusion_3, dual_attention_layers=()), ""),
    ("SD 3.5", stable_diffusion_3, "With blocks of two attentions."),
    ("PixArt-Σ", pixart, ""),
    ("FLUX.1 dev", flux, "With a ControlNet it runs dense."),
    ("FLUX.1 schnell", partial(flux, guidance=False), ""),
    ("FLUX.1 Kontext", flux_kontext, "Tokens of the picture to go by are pruned too."),
    ("FLUX.1 Fill", flux_fill, ""),
    ("FLUX.1 Control", partial(flux, "FluxControlPipeline", 32, control_image=picture()), ""),
    ("FLUX.2", flux_2, ""),
    ("Chroma", chroma, "Padded words stay masked."),
    ("HunyuanImage 2.1", hunyuan, ""),
    ("Qwen-Image", qwen, "Guidance in two calls."),
    ("Z-Image", z_image, ""),
    ("Wan 2.1, 2.2", wan, "`atedm.apply(pipe.transformer_2)` for the second model of 2.2."),
    ("AuraFlow", aura_flow, ""),
    ("CogView4", cog_view, ""),
    ("CogVideoX", cog_video, ""),
    ("LTX-Video", ltx, ""),
)
