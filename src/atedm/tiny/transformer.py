"""The shipped model as a diffusion transformer: SD3's class, small, trained as a rectified flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from atedm.tiny.autoencoder import FACTOR
from atedm.tiny.data import tokenize
from atedm.tiny.denoiser import freeze_unread, text_of
from atedm.tiny.scenes import CANVAS
from atedm.tiny.text import WIDTH

SHIFT = 1.5
"""How far sampling leans towards noisy times."""


_SIDE = CANVAS // FACTOR
_PATCH = 4
_WIDTH = 128
ALIGNED = (3, 5)
"""Blocks whose tokens a student compares with features of its teacher, while it learns."""


def build_transformer() -> SD3Transformer2DModel:
    """Build the untrained transformer, 4.7 M parameters: 8 blocks on 256 tokens of 16 x 16 px, as SD3 and FLUX cut."""
    return SD3Transformer2DModel(
        sample_size=_SIDE,
        patch_size=_PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=_WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=_SIDE // _PATCH,
        qk_norm="rms_norm",
    )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the sampler: straight lines from noise to picture."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class FlowDenoiser(nn.Module):
    """The text encoders and the transformer: token ids and noisy latents in, velocity out."""

    def __init__(
        self,
        text_encoders: Sequence[nn.Module],
        transformer: SD3Transformer2DModel,
        tokenizer: CLIPTokenizer,
        compiled: bool = True,
        teacher_widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoders
        self.transformer = transformer
        self.to_teacher = nn.ModuleList(nn.Linear(_WIDTH, width) for width in teacher_widths)
        # SD3 has no zeros for a missing caption: it reads an empty one.
        self.empty: Tensor
        self.register_buffer("empty", tokenize(tokenizer, [""]), persistent=False)
        self.places: Tensor
        every = get_2d_sincos_pos_embed(_WIDTH, _SIDE, base_size=_SIDE // _PATCH, output_type="pt")
        self.register_buffer("places", every.float().view(_SIDE, _SIDE, -1), persistent=False)
        freeze_unread(self.text_encoder)
        if compiled:
            for index, block in enumerate(self.transformer.transformer_blocks):
                if index not in ALIGNED or not teacher_widths:  # whose output is looked at
                    block.compile()

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        ids: Tensor,
        keep_caption: Tensor,
        sizes: Tensor,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity, noise minus picture; as `atedm.tiny.denoiser.Denoiser.forward`.

        A square out of a picture has the places in the picture that ``sizes`` (B, 6) says; SD3's own code would put
        it in the middle. What the student says of its teacher's features, (B, tokens, width) each, is added to the list
        ``features``.
        """
        ids = torch.where(keep_caption[:, None] > 0, ids, self.empty)
        words, pooled = text_of(self.text_encoder, self.text_encoder_2, ids)
        pooled = torch.cat([torch.zeros_like(pooled), pooled], dim=-1)
        # Written-out attention has the fastest backward pass on a CPU.
        with (
            _places_added(self.transformer.pos_embed, self._moved(noisy, sizes)),
            self._features_noted(features),
            sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION] if noisy.is_cuda else [SDPBackend.MATH]),
        ):
            return self.transformer(noisy, words, pooled, timesteps, return_dict=False)[0]  # type: ignore[no-any-return]

    @contextmanager
    def _features_noted(self, features: list[Tensor] | None) -> Iterator[None]:
        hooks = []
        if features is not None:
            for index, said in zip(ALIGNED, self.to_teacher, strict=True):

                def note(_: nn.Module, __: Any, returned: tuple[Tensor, Tensor], said: nn.Module = said) -> None:
                    features.append(said(returned[1]))

                hooks.append(self.transformer.transformer_blocks[index].register_forward_hook(note))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _moved(self, noisy: Tensor, sizes: Tensor) -> Tensor | None:
        """What to add to the places that SD3 gives, (B, tokens, width): nothing to whole pictures."""
        height, width = noisy.shape[-2:]
        if torch.equal(sizes[:, :2], sizes[:, 4:]):
            return None
        corners = ((sizes[:, 2:4] + FACTOR // 2) // FACTOR).tolist()
        wanted = [self.places[y : y + height : _PATCH, x : x + width : _PATCH].flatten(0, 1) for y, x in corners]
        own: Tensor = self.transformer.pos_embed.cropped_pos_embed(height, width)
        return torch.stack(wanted) - own


@contextmanager
def _places_added(embedding: nn.Module, places: Tensor | None) -> Iterator[None]:
    if places is None:
        yield
        return
    hook = embedding.register_forward_hook(lambda _, __, tokens: (tokens + places).to(tokens.dtype))
    try:
        yield
    finally:
        hook.remove()


class CaptionOnlySD3Pipeline(StableDiffusion3Pipeline):  # type: ignore[misc]
    """SD3's pipeline for a model without T5: where SD3 fills in 256 tokens of zeros, it fills in none."""

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]  # noqa: RUF012

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:  # or diffusers warns of an autoencoder that is not SD3's own
        return {**super()._get_signature_types(), "vae": (AutoencoderTiny,)}

    def _get_t5_prompt_embeds(self, prompt: Any = None, num_images_per_prompt: int = 1, **_: Any) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        width = self.transformer.config.joint_attention_dim
        count = len(prompts) * num_images_per_prompt
        return torch.zeros(count, 0, width, device=self._execution_device, dtype=self.text_encoder.dtype)


def with_projection(encoder: Any) -> CLIPTextModelWithProjection:
    """Give an encoder the pooled caption that SD3 asks for: zeros, as in training."""
    whole = CLIPTextModelWithProjection(encoder.config)
    weights = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    inner = getattr(whole, "text_model", whole)
    inner.load_state_dict(weights, strict=inner is not whole)
    nn.init.zeros_(whole.text_projection.weight)
    return whole.eval()
