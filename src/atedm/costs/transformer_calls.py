"""What a call of a transformer is given, by its config: random numbers, or tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from atedm.hosts.diffusers_dit import known_family
from atedm.hosts.dit_families import FAMILIES

PACKED = ("FluxTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel")
"""Models that are handed latents of which 2 x 2 make a token."""
VIDEO = ("WanTransformer3DModel", "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel")
"""Models of videos. Their costs are counted for one frame of latents."""
_WORDS = {
    "SD3Transformer2DModel": 333,
    "PixArtTransformer2DModel": 300,
    "ZImageTransformer2DModel": 128,
    "FluxTransformer2DModel": 512,
    "Flux2Transformer2DModel": 512,
    "ChromaTransformer2DModel": 512,
    "WanTransformer3DModel": 512,
}

Make = Callable[..., Tensor]
"""Makes a tensor of a shape."""


def timestep_of(name: str, noise: float) -> float:
    """Return the value of the timestep at which a model of class ``name`` sees so much noise, in [0, 1]."""
    to_noise = FAMILIES[name].noise
    return next(value for value in (noise, 1 - noise, 1000 * noise) if abs(to_noise(value) - noise) < 1e-6)


def words_of(name: str) -> int:
    """Return how many text tokens the pipelines of a model of class ``name`` give it."""
    return _WORDS.get(name, 256)


def at_noise(model: Any, call: Mapping[str, Any], noise: float) -> dict[str, Tensor]:
    """Return what has to take the place of the timestep of a call, so that its step has so much noise, in [0, 1]."""
    family = known_family(model)
    name = next(name for name, known in FAMILIES.items() if known is family)
    return {family.timestep: torch.full_like(call[family.timestep], timestep_of(name, noise))}


def transformer_call(
    config: Mapping[str, Any],
    size: tuple[int, int],
    batch: int,
    words: int,
    make: Make,
    *,
    noise: float = 0.5,
    device: torch.device | str = "meta",
) -> dict[str, Any]:
    """Return the arguments of a call of the model that ``config`` describes.

    Args:
        config: With its class under ``_class_name``.
        size: (h, w) of the image tokens.
        batch: Images.
        words: Tokens of a caption.
        make: Makes a floating tensor of a shape.
        noise: Noise in [0, 1] that the timestep stands for.
        device: Where to put what ``make`` does not make.
    """
    name = config["_class_name"]
    family = FAMILIES[name]
    height, width = size
    timestep = torch.full((batch,), timestep_of(name, noise), device=device)
    text = make(batch, words, _text_width(config))
    call: dict[str, Any] = {"return_dict": False, family.timestep: timestep, family.text: text}
    channels = config.get("in_channels", 4)
    if name == "ZImageTransformer2DModel":
        latents = [make(channels, 1, 2 * height, 2 * width) for _ in range(batch)]
        return call | {"x": latents, "cap_feats": list(text.unbind(0))}
    if name in PACKED:
        call |= {"hidden_states": make(batch, height * width, channels)}
        columns = len(config["axes_dims_rope"])
        call |= {"img_ids": _ids(height, width, columns).to(device), "txt_ids": torch.zeros(words, columns).to(device)}
        if name == "FluxTransformer2DModel":
            call["pooled_projections"] = make(batch, config["pooled_projection_dim"])
        if config.get("guidance_embeds", name == "Flux2Transformer2DModel"):
            call["guidance"] = torch.ones(batch, device=device)
        return call
    if name == "QwenImageTransformer2DModel":
        return call | {
            "hidden_states": make(batch, height * width, channels),
            "img_shapes": [[(1, height, width)]] * batch,
        }
    if name == "LTXVideoTransformer3DModel":
        call |= {"hidden_states": make(batch, height * width, channels), "num_frames": 1}
        return call | {"height": height, "width": width, "encoder_attention_mask": torch.ones(batch, words).to(device)}
    patch = config.get("patch_size", 1)
    of_height, of_width = (patch, patch) if isinstance(patch, int) else patch[-2:]
    sides = (of_height * height, of_width * width)
    if name == "WanTransformer3DModel":
        return call | {"hidden_states": make(batch, channels, 1, *sides)}
    if name == "CogVideoXTransformer3DModel":
        call["hidden_states"] = make(batch, 1, channels, *sides)
        if config.get("use_rotary_positional_embeddings"):
            table = make(height * width, config["attention_head_dim"])
            call["image_rotary_emb"] = (table.cos(), table.sin())
        return call
    call["hidden_states"] = make(batch, channels, *sides)
    if name == "SD3Transformer2DModel":
        call["pooled_projections"] = make(batch, config["pooled_projection_dim"])
    elif name == "HunyuanImageTransformer2DModel":
        call["encoder_attention_mask"] = torch.ones(batch, words, dtype=torch.bool, device=device)
    elif name == "CogView4Transformer2DModel":
        of_sizes = ("original_size", "target_size", "crop_coords")
        call |= {key: torch.full((batch, 2), 16.0, device=device) for key in of_sizes}
    elif config.get("use_additional_conditions"):
        call["added_cond_kwargs"] = {"resolution": make(batch, 2), "aspect_ratio": make(batch, 1)}
    return call


def _text_width(config: Mapping[str, Any]) -> int:
    names = ("joint_attention_dim", "caption_channels", "text_embed_dim", "cap_feat_dim", "text_dim")
    return int(next(config[name] for name in names if config.get(name)))


def _ids(height: int, width: int, columns: int) -> Tensor:
    """Places (h w, columns) of a grid of tokens: row and column in the second and third."""
    ids = torch.zeros(height, width, columns)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)
