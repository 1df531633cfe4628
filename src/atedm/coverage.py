"""Kept sets that cover: so spread over the grid, or over the features, that every dropped token has a kept one like it.

Each gives an importance (N,) or (B, N) of which the largest K cover for any K, so that these rankings stand beside
those by attention. Lattice and cells know nothing of the image, move with the denoising step and use no random numbers:
equal runs stay equal, and over a few steps every token is kept in some.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atedm.attention_map import without_autocast
from atedm.matching import match_by_features
from atedm.pruning import keep_most_important

_UINT32 = 0xFFFFFFFF
# 1/p and 1/p^2 of the plastic number p = 1.3247 (Roberts, The Unreasonable Effectiveness of Quasirandom Sequences,
# 2018), and the golden ratio's 0.618, in units of 2^-32.
_ALONG_X, _ALONG_Y, _ALONG_STEPS = 0xC13FA9A9, 0x91E10DA5, 0x9E3779B9
_BITS = 12  # of a place along one side: grids up to 4096 tokens wide, and 24 bits are what a float32 holds exactly


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
    y, x = _grid(size, device)
    phase = (x * _ALONG_X + y * _ALONG_Y + (step & _UINT32) * _ALONG_STEPS) & _UINT32
    return 1 - (phase >> 8).float() / 2**24


def cells(size: tuple[int, int], *, step: int | Tensor = 0, device: torch.device | str | None = None) -> Tensor:
    """Importance by the ordered-dither matrix (Bayer, 1973): one token of each 2 x 2 cell, then the next of each.

    Args:
        size: (h, w) of the grid, at most 4096 each.
        step: Index of the denoising step, at least 0; the matrix is shifted by its bits, so that four steps in a row
            begin with the four tokens of a cell.
        device: Where to put the result.

    Returns:
        (h w,) float32 in (0, 1], in raster order, all different.
    """
    y, x = _grid(size, device)
    mask = 2**_BITS - 1
    x, y = (x + _every_other_bit(step)) & mask, (y + _every_other_bit(step >> 1)) & mask
    rank = torch.zeros_like(x)
    for bit in range(_BITS):  # of the place, from the least; it is the most significant of the rank
        shift = 2 * (_BITS - 1 - bit)
        rank = rank | ((((x ^ y) >> bit) & 1) << (shift + 1)) | (((y >> bit) & 1) << shift)
    importance: Tensor = 1 - rank.float() / 4**_BITS
    return importance


def important_of_cells(importance: Tensor, size: tuple[int, int]) -> Tensor:
    """Cover by importance: the most important token of each 2 x 2 cell before the second of any.

    Args:
        importance: (B, N) with N = h w in raster order, in [0, 1].
        size: (h, w); cells at an odd edge are smaller.

    Returns:
        (B, N) float32: 3 minus the place within the cell, plus the importance.
    """
    (h, w), batch = size, importance.shape[0]
    padded = functional.pad(importance.float().reshape(batch, h, w), (0, w % 2, 0, h % 2), value=-1.0)
    rows, columns = padded.shape[1] // 2, padded.shape[2] // 2
    cell = padded.reshape(batch, rows, 2, columns, 2).permute(0, 1, 3, 2, 4).flatten(3)
    place = cell.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    place = torch.unflatten(place, 3, (2, 2)).permute(0, 1, 3, 2, 4).reshape(padded.shape)[:, :h, :w]
    # An importance of 1 would reach up to the next place.
    within: Tensor = 3 - place.reshape(batch, -1)
    return within + importance.float().clamp(0, 1) * (1 - 2**-10)


def representative(tokens: Tensor, cover: Tensor, count: int, cover_share: float, by: str = "euclidean") -> Tensor:
    """Cover first, then add what the cover is least like: what has no likeness among the kept cannot be refilled.

    Args:
        tokens: (B, N, C), any floating dtype.
        cover: (N,) or (B, N), an order of the tokens that covers, largest first.
        count: K, how many will be kept.
        cover_share: Share of the K that are the first of the cover; the others are the tokens of the worst match
            among these.
        by: As `atedm.matching.match_by_features`.

    Returns:
        (B, N) float32 in [0, 2]: 2 for the cover, and for the others how badly they match, as a share of the worst.
    """
    batch, number, _ = tokens.shape
    base = keep_most_important(cover.expand(batch, number), max(1, round(cover_share * count)))
    unlike = -match_by_features(tokens, base, by).similarity
    unlike = unlike - unlike.amin(-1, keepdim=True)
    return (unlike / unlike.amax(-1, keepdim=True).clamp_min(1e-20)).scatter(1, base, 2.0)


def facility_location(tokens: Tensor, count: int) -> Tensor:
    """Importance by greedy facility location: each token added is the one that makes the sum of best cosines largest.

    The sum of what dropped tokens have in common with their best kept ones is what a match lives on, so this is what a
    cover could be, at N^2 memory and K passes over it: a reference to measure others by, not for use.

    Args:
        tokens: (B, N, C), any floating dtype.
        count: K, how many to choose.

    Returns:
        (B, N) float32: K for the first chosen down to 1, and 0 for those not chosen.
    """
    with without_autocast(tokens.device):
        unit = functional.normalize(tokens.float(), dim=-1)
        cosine = unit @ unit.mT
    covered = cosine.new_full(cosine.shape[:2], -1.0)
    importance = torch.zeros_like(covered)
    for chosen in range(count):
        gain = (cosine - covered.unsqueeze(1)).clamp_min_(0).sum(-1)
        best = gain.masked_fill(importance > 0, -1.0).argmax(-1, keepdim=True)
        importance.scatter_(1, best, float(count - chosen))
        of_best = cosine.gather(1, best.unsqueeze(-1).expand(-1, -1, cosine.shape[2])).squeeze(1)
        covered = torch.maximum(covered, of_best)
    return importance


def _grid(size: tuple[int, int], device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Row and column of every token in raster order, int64."""
    token = torch.arange(size[0] * size[1], device=device)
    return token // size[1], token % size[1]


def _every_other_bit(step: int | Tensor) -> int | Tensor:
    """Bits 0, 2, 4, 6 of ``step`` as a number of four bits."""
    return sum(((step >> (2 * bit)) & 1) << bit for bit in range(4))
