"""Filling the dropped positions again, because a convolution needs the whole feature map.

Similarity-based copy is the paper's way; zero padding, bicubic interpolation and direct copy are its baselines
(supplement A.6); the matched update is our own. ``keep`` (B, K) always holds the indices of the kept tokens,
``kept_tokens`` (B, K, C) their values after the last layer of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atedm.pruning import gather_tokens

# --- By what is alike -------------------------------------------------------------------------------------------------


def similarity_copy(kept_tokens: Tensor, source: Tensor) -> Tensor:
    """Similarity-based copy: ``out[b] = kept_tokens[source(b)]``, the paper's recovery.

    Args:
        kept_tokens: (B, K, C).
        source: (B, N) int64 positions within K, by one of `atedm.matching`.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens``: a token that is copied often gets that many gradients.
    """
    return gather_tokens(kept_tokens, source)


def matched_update(kept_tokens: Tensor, start: Tensor, before: Tensor, source: Tensor) -> Tensor:
    """Own value plus the update of the match: ``out[b] = before[b] + kept_tokens[s] - start[s]`` with s = source(b).

    A block is residual. What it adds to two tokens that are alike is alike, so a dropped token keeps what is its own
    and takes over what the block did to its match.

    Args:
        kept_tokens: (B, K, C).
        start: Kept tokens as they were when the others were dropped, (B, K, C).
        before: All tokens as they were then, (B, N, C), dtype of ``kept_tokens``.
        source: (B, N) int64 positions within K, by one of `atedm.matching`.

    Returns:
        (B, N, C) in the dtype of ``kept_tokens``, summed in float32. Differentiable in all but ``source``.
    """
    update = update_of_match(kept_tokens, start, source)
    return (before.to(update.dtype) + update).to(kept_tokens.dtype)


def update_of_match(kept_tokens: Tensor, start: Tensor, source: Tensor) -> Tensor:
    """What a block added to the match of each token: ``out[b] = kept_tokens[s] - start[s]`` with s = source(b).

    Args:
        kept_tokens: (B, K, C).
        start: (B, K, C).
        source: (B, N) int64 positions within K.

    Returns:
        (B, N, C) float32, or better where the tokens are.
    """
    # In 16 bits the difference and the sum would each be rounded, and a kept token come back as another.
    dtype = torch.promote_types(kept_tokens.dtype, torch.float32)
    return gather_tokens(kept_tokens.to(dtype) - start.to(dtype), source)


def with_own_update(update: Tensor, last: Tensor, source: Tensor, kept: int, share: float) -> Tensor:
    """Add to each token's update what set its last one apart from those of its group now.

    ``out[b] = update[b] + share * (last[b] - mean of last over all tokens of the source of b)``. Tokens of one group
    get one update a step, but groups change, so what a token alone was given in one step lives on, fading, in the next.

    Args:
        update: (B, N, C), the same for all tokens of one source.
        last: (B, N, C), what was returned the step before.
        source: (B, N) int64 positions within K.
        kept: K.
        share: From 0, ``update`` as it is, to 1, the last update moved by what the group's mean moved.

    Returns:
        (B, N, C) in the dtype of ``update``.
    """
    each = torch.ones(source.shape, dtype=torch.float32, device=last.device)
    size = each.new_zeros(source.shape[0], kept).scatter_add(1, source, each)
    mean = mean_by_source(last.to(update.dtype), source, each, size)
    return update + share * (last.to(update.dtype) - gather_tokens(mean, source))


def mean_by_source(tokens: Tensor, source: Tensor, weights: Tensor, gathered: Tensor) -> Tensor:
    """Weighted mean of the tokens that share a source.

    Args:
        tokens: (B, N, C).
        source: (B, N) int64 positions within K.
        weights: (B, N) float32 of the tokens.
        gathered: (B, K) float32, the sum of the weights by source.

    Returns:
        (B, K, C) in the dtype of ``tokens``, summed in float32 or better.
    """
    batch, kept = gathered.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    weighted = tokens.to(dtype) * weights.unsqueeze(-1)
    # Rows of the whole batch at once: adding row to row is many times faster than entry to entry.
    row = (source + kept * torch.arange(batch, device=source.device).unsqueeze(-1)).flatten()
    sums = weighted.new_zeros(batch * kept, tokens.shape[2])
    if sums.device.type == "cuda":  # which adds in any order, and would not give the same image twice; this one sorts
        sums = sums.index_put((row,), weighted.flatten(0, 1), accumulate=True)
    else:
        sums = sums.index_add(0, row, weighted.flatten(0, 1))
    return (torch.unflatten(sums, 0, (batch, kept)) / gathered.unsqueeze(-1)).to(tokens.dtype)


def weighted_update(kept_tokens: Tensor, keep: Tensor, before: Tensor, weights: Tensor) -> Tensor:
    """Own value plus a weighted mean of all updates: a control for `matched_update`.

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        before: All tokens as they were when some were dropped, (B, N, C), dtype of ``kept_tokens``.
        weights: (B, N, K), rows sum to 1, by one of `atedm.matching`.

    Returns:
        (B, N, C); kept tokens are ``kept_tokens`` exactly. Differentiable in ``kept_tokens`` and ``before``.
    """
    update = kept_tokens - gather_tokens(before, keep)
    return direct_copy(kept_tokens, keep, before + weights.to(update.dtype) @ update)


# --- Baselines (supplement A.6) ---------------------------------------------------------------------------------------


def direct_copy(kept_tokens: Tensor, keep: Tensor, before: Tensor) -> Tensor:
    """Dropped tokens take the value they had when they were dropped (supplement A.6 III).

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        before: All tokens as they were before pruning, (B, N, C), dtype of ``kept_tokens``.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens`` and ``before``.
    """
    return before.scatter(1, keep.unsqueeze(-1).expand_as(kept_tokens), kept_tokens)


def zero_padding(kept_tokens: Tensor, keep: Tensor, tokens: int) -> Tensor:
    """Dropped tokens become zero (supplement A.6 I).

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        tokens: N.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens``.
    """
    batch, _, channels = kept_tokens.shape
    return direct_copy(kept_tokens, keep, kept_tokens.new_zeros(batch, tokens, channels))


def bicubic_interpolation(kept_tokens: Tensor, keep: Tensor, size: tuple[int, int]) -> Tensor:
    """Dropped tokens are interpolated from a half-size image with zeros in their places (supplement A.6 II).

    Zeros in, h x w to h/2 x w/2 and back by bicubic interpolation without antialiasing; half an odd side is rounded
    down, to 1 at least. Only dropped positions take the result.

    Args:
        kept_tokens: (B, K, C).
        keep: (B, K) int64.
        size: (h, w) with N = h w, tokens in raster order.

    Returns:
        (B, N, C) in the dtype of ``kept_tokens``, interpolated in float32 or better. Differentiable in
        ``kept_tokens``.
    """
    h, w = size
    dtype = torch.promote_types(kept_tokens.dtype, torch.float32)
    padded = zero_padding(kept_tokens.to(dtype), keep, h * w)
    image = padded.mT.reshape(*padded.mT.shape[:2], h, w)
    half = functional.interpolate(image, (max(h // 2, 1), max(w // 2, 1)), mode="bicubic", align_corners=False)
    whole = functional.interpolate(half, (h, w), mode="bicubic", align_corners=False)
    return direct_copy(kept_tokens, keep, whole.flatten(2).mT.to(kept_tokens.dtype))
