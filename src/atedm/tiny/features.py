"""Features of the small SDXL that the small SD3 is shown while it learns (after Yu et al., 2024, REPA).

A transformer learns slowly what is where. The small SDXL knows: its features of a picture with hardly any noise say it
for every token. In the middle of its blocks the student learns to say the same of a noisy picture. They belong to the
picture and not to its noise, so they are made once for each picture of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from atedm.tiny.denoiser import Denoiser, load_parts
from atedm.tiny.text import build_text_encoders
from atedm.tiny.unet import build_scheduler, build_unet

TOKEN = 16
"""Pixels a side of a token."""
WIDTHS = (96, 320)
"""Of the features of one token."""
WEIGHT = 0.2
"""Of each distance between features, beside that between outputs."""
_LOOKED_AT = (("up_blocks.0.attentions", 1), ("up_blocks.1.attentions", 2))
"""Modules whose last one gives features, and how many of these lie along a side of a token."""
_TIME = 100
"""Of 1000, where noise has 11 % of the variance."""


class Teacher:
    """The small SDXL, which is asked for its features."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        """Open the pipeline in a folder; ``tokenizer`` is that of the captions."""
        self._model = Denoiser(build_text_encoders(tokenizer), build_unet(), compiled=False)
        load_parts(self._model, folder)
        self._model.eval().requires_grad_(False).to(device)
        remaining = float(build_scheduler().alphas_cumprod[_TIME])
        self._signal, self._sigma = remaining**0.5, (1 - remaining) ** 0.5
        self._seen: list[Tensor] = []
        for name, _ in _LOOKED_AT:
            last = self._model.unet.get_submodule(name)[-1]
            last.register_forward_hook(lambda _, __, returned: self._seen.append(returned[0]))

    @torch.no_grad()
    def features(self, picture: Tensor, ids: Tensor, sizes: Tensor) -> list[Tensor]:
        """Return (B, tokens, width) float16 for each of `WIDTHS`, of mean 0 and variance 1 in each token.

        Args:
            picture: (B, 4, h, w) latents.
            ids: (B, TOKENS) int64.
            sizes: (B, 6): see `atedm.tiny.denoiser.whole_picture`.
        """
        times = torch.full((len(picture),), _TIME, device=picture.device)
        noisy = self._signal * picture + self._sigma * torch.randn_like(picture)
        self._seen.clear()
        with torch.autocast(picture.device.type, torch.bfloat16):
            self._model(noisy, times, ids, torch.ones(len(picture), device=picture.device), sizes)
        sides = [side for _, side in _LOOKED_AT]
        return [_by_token(seen, side) for seen, side in zip(self._seen, sides, strict=True)]


def _by_token(features: Tensor, side: int) -> Tensor:
    """Put (B, C, h, w) features of ``side`` x ``side`` places side by side: (B, tokens, C side side), normed."""
    tokens = functional.pixel_unshuffle(features.float(), side).flatten(2).transpose(1, 2)
    return functional.layer_norm(tokens, tokens.shape[-1:]).half()


def distance(said: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Return the weighted mean squares of the distance between a student's words and a teacher's features."""
    pairs = zip(said, features, strict=True)
    return WEIGHT * sum((functional.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs), torch.zeros(()))
