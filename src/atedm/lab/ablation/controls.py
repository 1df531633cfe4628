"""Rankings to hold the methods' own against: by attention received, by chance, and by place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atedm.method.attention_map import without_autocast

_UINT32 = 0xFFFFFFFF
_BITS = 12  # of a place along one side: grids up to 4096 tokens wide, and 24 bits are what a float32 holds exactly


def attention_received(attention_map: Tensor) -> Tensor:
    """``mean_i A_ij``, the attention each key gets of A, (..., M, N): one iteration of self-attention G-WPR.

    Returns (..., N) float32, which sums to 1.
    """
    return attention_map.mean(-2, dtype=torch.float32)


def uniform_random(
    batch: int, tokens: int, *, seed: int, step: int | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Importance by chance: a hash of (seed, step, place in the batch, token), (batch, tokens) float32 in [0, 1).

    No generator is read or advanced, so the images' own noise stays as it was, the numbers are equal on every device,
    and the function can be compiled. Of the seed the low 64 bits count, of the denoising step the low 32.
    """
    batch_index = torch.arange(batch, device=device).unsqueeze(-1)
    token_index = torch.arange(tokens, device=device)
    state = torch.zeros(1, 1, dtype=torch.int64, device=device)
    word: int | Tensor
    for word in (seed & _UINT32, (seed >> 32) & _UINT32, step, batch_index, token_index):
        state = _splitmix32(state + word)
    return (state >> 8).float() / 2**24  # 24 bits are what a float32 holds exactly


def _splitmix32(x: Tensor) -> Tensor:
    """The splitmix32 step on int64 values in [0, 2^32): a bijection that mixes every bit into every other.

    Both multipliers are below 2^31, so a product stays below 2^63: no signed overflow, whose result is not defined.
    """
    x = (x + 0x9E3779B9) & _UINT32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _UINT32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _UINT32
    return x ^ (x >> 15)


def cells(size: tuple[int, int], *, step: int | Tensor = 0, device: torch.device | str | None = None) -> Tensor:
    """Importance by the ordered-dither matrix (Bayer, 1973): one token of each 2 x 2 cell, then the next of each.

    ``size`` is (h, w), at most 4096 each. The matrix is shifted by the bits of the denoising step, so that four steps
    in a row begin with the four tokens of a cell. Returns (h w,) float32 in (0, 1], in raster order, all different.
    """
    token = torch.arange(size[0] * size[1], device=device)
    y, x = token // size[1], token % size[1]
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

    ``importance`` is (B, h w) in raster order, in [0, 1]; cells at an odd edge of ``size`` (h, w) are smaller. Returns
    (B, h w) float32: 3 minus the place within the cell, plus the importance.
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


def facility_location(tokens: Tensor, count: int) -> Tensor:
    """Importance by greedy facility location: each token added is the one that makes the sum of best cosines largest.

    The sum of what dropped tokens have in common with their best kept ones is what a match lives on, so this is what a
    cover could be, at N^2 memory and K passes over it: a reference to measure others by, not for use.

    Of ``tokens`` (B, N, C) it chooses ``count``, K. Returns (B, N) float32: K for the first chosen down to 1, and 0 for
    those not chosen.
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


def _every_other_bit(step: int | Tensor) -> int | Tensor:
    """Bits 0, 2, 4, 6 of ``step`` as a number of four bits."""
    return sum(((step >> (2 * bit)) & 1) << bit for bit in range(4))
