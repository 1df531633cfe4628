"""Write a pipeline as community sites share it: one file, its layers named as in the original Stable Diffusion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

UNET_NAMES = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"\.norm1\.(?=\w+$)", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.(?=\w+$)", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
VAE_NAMES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
)
OPEN_CLIP_NAMES = (
    (r"^text_model\.", ""),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def save_as_single_file(pipe: Any, file: Path) -> None:
    """Write SDXL's or SD 1.x's parts into one ``.safetensors`` file, in float32."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in _unet(pipe.unet).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in _vae(pipe.vae).items()}
    two_encoders = getattr(pipe, "text_encoder_2", None) is not None
    first = "conditioner.embedders.0.transformer." if two_encoders else "cond_stage_model.transformer."
    for name, value in pipe.text_encoder.state_dict().items():
        # The newest transformers has left out a level that the file keeps.
        tensors[first + "text_model." + name.removeprefix("text_model.")] = value
    if two_encoders:
        found = _open_clip(pipe.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in found.items()}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)


def _renamed(name: str, rules: Any) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block

    def place(name: str) -> str:
        found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
        if found is None:
            return name
        way, block, what, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        first = 1 + block * (layers + 1) if way == "down" else block * (layers + 1)
        side = "input" if way == "down" else "output"
        if what == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        if what == "upsamplers":
            behind = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            return f"output_blocks.{first + layers}.{behind}.{rest}"
        return f"{side}_blocks.{first + number}.{int(what == 'attentions')}.{rest}"

    renamed = {}
    for name, value in unet.state_dict().items():
        # Layers of attention are called the same in both; their norms look like those of convolutions.
        rules = [rule for rule in UNET_NAMES if "transformer_blocks" not in name or not rule[0].startswith(r"\.")]
        renamed[_renamed(place(name), rules)] = value
    return renamed


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1

    def up(name: str) -> str:
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
        return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)

    tensors = {}
    for name, value in vae.state_dict().items():
        one_by_one = re.search(r"attentions\.0\.to_.*weight$", name)
        tensors[_renamed(up(name), VAE_NAMES)] = value[..., None, None] if one_by_one else value
    return tensors


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    weights = {_renamed(name, OPEN_CLIP_NAMES): value for name, value in encoder.state_dict().items()}
    weights["text_projection"] = weights.pop("text_projection.weight").T
    for name in [name for name in weights if ".q_proj." in name]:
        before, kind = name.split(".q_proj.")
        parts = [weights.pop(f"{before}.{part}_proj.{kind}") for part in "qkv"]
        weights[f"{before}.in_proj_{kind}"] = torch.cat(parts)
    return weights
