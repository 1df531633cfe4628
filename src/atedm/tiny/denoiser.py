"""What is trained: the text encoders and the U-Net as one module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor, nn

PARTS = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}
"""The modules, and the files of their weights in a pipeline's folder."""


def whole_picture(canvas: int, count: int, device: torch.device) -> Tensor:
    """SDXL's sizes of pictures that are not cropped, (count, 6): original, top and left of the crop, target."""
    return torch.tensor([canvas, canvas, 0, 0, canvas, canvas], device=device).expand(count, 6)


def text_of(first: nn.Module, second: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token ids (B, TOKENS): words of both encoders (B, TOKENS, 2 WIDTH), and the second's pooled caption."""
    pooled = second(ids, output_hidden_states=True)
    words = first(ids, output_hidden_states=True).hidden_states[-2]
    return torch.cat([words, pooled.hidden_states[-2]], dim=-1), pooled.text_embeds


def freeze_unread(encoder: nn.Module) -> None:
    """Freeze the last layer of the first encoder, of which the layer before it is read and no pooled caption."""
    for name, parameter in encoder.named_parameters():
        if "encoder.layers.2." in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


class Denoiser(nn.Module):
    """The text encoders and the U-Net: token ids and noisy latents in, v out."""

    def __init__(self, text_encoders: Sequence[nn.Module], unet: UNet2DConditionModel, compiled: bool = True) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoders
        self.unet = unet
        freeze_unread(self.text_encoder)
        self.unet.set_attn_processor(_PlainAttention())
        if compiled:
            self.unet.compile_repeated_blocks()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, keep_caption: Tensor, sizes: Tensor) -> Tensor:
        """Predict v.

        Args:
            noisy: (B, 4, h, w).
            timesteps: (B,), 0 to 999.
            ids: (B, TOKENS) int64.
            keep_caption: (B,); rows where it is 0 see no caption.
            sizes: (B, 6): see `whole_picture`.
        """
        words, pooled = text_of(self.text_encoder, self.text_encoder_2, ids)
        words = words * keep_caption[:, None, None]
        added = {"text_embeds": pooled * keep_caption[:, None], "time_ids": sizes}
        return self.unet(noisy, timesteps, words, added_cond_kwargs=added, return_dict=False)[0]  # type: ignore[no-any-return]


def load_parts(model: nn.Module, folder: Path) -> None:
    """Take the weights of a pipeline's folder: those of the parts that both have."""
    for part, file in PARTS.items():
        if hasattr(model, part) and (folder / part / file).exists():
            getattr(model, part).load_state_dict(load_file(folder / part / file))


class _PlainAttention:
    """Softmax attention written out: on CPUs its backward pass in bfloat16 is several times faster than fused ones."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        if q.device.type != "cpu":
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        else:
            mixed = (q * attn.scale @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
