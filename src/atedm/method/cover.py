"""Kept sets that cover the grid and represent the features, so that every dropped token has a kept one like it.

Nothing here draws random numbers, so equal runs stay equal. The lattice moves with the denoising step: over a few steps
every token is kept in some.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.method.keep import keep_most_important
from atedm.method.matching import match_by_features

_UINT32 = 0xFFFFFFFF
# 1/p and 1/p^2 of the plastic number p = 1.3247 (Roberts, The Unreasonable Effectiveness of Quasirandom Sequences,
# 2018), and the golden ratio's 0.618, in units of 2^-32.
_ALONG_X, _ALONG_Y, _ALONG_STEPS = 0xC13FA9A9, 0x91E10DA5, 0x9E3779B9


def lattice(size: tuple[int, int], *, step: int | Tensor = 0, device: torch.device | str | None = None) -> Tensor:
    """Importance by a low-discrepancy sequence of the plane: ``1 - frac(x / p + y / p^2 + 0.618 step)``.

    The largest K of it are close to a lattice of that density, for every K.

    Args:
        size: (h, w) of the grid.
        step: Index of the denoising step, at least 0; a tensor without dimensions is as good.
        device: Where to put the result.

    Returns:
        (h w,) float32 in (0, 1], in raster order, multiples of 2^-24.
    """
    token = torch.arange(size[0] * size[1], device=device)
    y, x = token // size[1], token % size[1]
    phase = (x * _ALONG_X + y * _ALONG_Y + (step & _UINT32) * _ALONG_STEPS) & _UINT32
    return 1 - (phase >> 8).float() / 2**24


def representative(tokens: Tensor, cover: Tensor, count: int, cover_share: float) -> Tensor:
    """Cover first, then add what the cover is least like: what has no likeness among the kept cannot be refilled.

    Args:
        tokens: (B, N, C), any floating dtype.
        cover: (N,) or (B, N), an order of the tokens that covers, largest first.
        count: K, how many will be kept.
        cover_share: Share of the K that are the first of the cover; the others are the tokens of the worst match
            among these.

    Returns:
        (B, N) float32 in [0, 2]: 2 for the cover, and for the others how badly they match, as a share of the worst.
    """
    batch, number, _ = tokens.shape
    base = keep_most_important(cover.expand(batch, number), max(1, round(cover_share * count)))
    unlike = -match_by_features(tokens, base).similarity
    unlike = unlike - unlike.amin(-1, keepdim=True)
    share: Tensor = unlike / unlike.amax(-1, keepdim=True).clamp_min(1e-20)
    return share.float().scatter(1, base, 2.0)
