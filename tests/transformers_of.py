"""Small random transformers of each family, and the arguments of a call of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from atedm.app.models import load_pipeline
from atedm.costs.transformer_calls import transformer_call
from atedm.tiny.transformer import (
    CaptionOnlySD3Pipeline,
    build_flow_scheduler,
    build_transformer,
    with_projection,
)

SIDE = 8
"""Image tokens a side."""
TEXT = 5
"""Tokens of a caption."""

CONFIGS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 5,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1, 2),
        "qk_norm": "rms_norm",
    },
    "PixArtTransformer2DModel": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 5,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "use_additional_conditions": False,
    },
    "FluxTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 12,
        "axes_dims_rope": [4, 4, 8],
    },
    "Flux2Transformer2DModel": {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": [4, 4, 4, 4],
    },
    "ChromaTransformer2DModel": {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": [4, 4, 8],
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "QwenImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 5,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (8, 4, 4),
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_single_layers": 4,
        "num_refiner_layers": 1,
        "patch_size": (1, 1),
        "text_embed_dim": 12,
        "rope_axes_dim": (4, 4),
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 32,
        "n_layers": 5,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [4, 4, 8],
        "axes_lens": [256, 32, 32],
    },
    "WanTransformer3DModel": {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 5,
        "cross_attn_norm": True,
        "rope_max_seq_len": 64,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 3,
        "num_single_dit_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 64,
    },
    "CogView4Transformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 5,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "out_channels": 4,
        "text_embed_dim": 12,
        "time_embed_dim": 16,
        "condition_dim": 4,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 12,
        "num_layers": 5,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 1,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 5,
        "caption_channels": 12,
    },
}


def transformer(name: str, seed: int = 0, **changes: Any) -> Any:
    """Build a small model of a class of diffusers, with random weights."""
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**CONFIGS[name] | changes).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # gates and output layers are zero at birth, and would hide what a block does
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def call_of(
    name: str, *, noise: float = 0.9, batch: int = 2, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0
) -> dict[str, Any]:
    """Return the arguments of a call of a model of `CONFIGS` at (h, w) image tokens; some words are padding."""
    generator = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, generator=generator)
    config = {"_class_name": name} | CONFIGS[name]
    call = transformer_call(config, size, batch, TEXT, make, noise=noise, device="cpu")
    words = torch.ones(batch, TEXT, dtype=torch.bool)
    words[0, -2:] = False
    if name == "ChromaTransformer2DModel":
        image = torch.ones(batch, size[0] * size[1], dtype=torch.bool)
        call["attention_mask"] = torch.cat([words, image], dim=1)
    elif name == "QwenImageTransformer2DModel":
        call["encoder_hidden_states_mask"] = words
    elif name == "HunyuanImageTransformer2DModel":
        call["encoder_attention_mask"] = words
    elif name == "ZImageTransformer2DModel":
        call["cap_feats"] = [make(TEXT + 2 * index, 12) for index in range(batch)]
    return call


def image_of(returned: Any) -> Tensor:
    """What a call returned, as one tensor."""
    sample = returned[0]
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


def small_sd3(seed: int = 0) -> Any:
    """The small SD3 as a pipeline, with random weights and the shipped model's text encoders and autoencoder."""
    tiny = load_pipeline("tiny", device="cpu")
    torch.manual_seed(seed)
    pipe = CaptionOnlySD3Pipeline(
        transformer=build_transformer().eval(),
        scheduler=build_flow_scheduler(),
        vae=tiny.vae,
        text_encoder=with_projection(tiny.text_encoder),
        tokenizer=tiny.tokenizer,
        text_encoder_2=tiny.text_encoder_2,
        tokenizer_2=tiny.tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
