"""Filling the dropped positions again, because a convolution needs the whole feature map.

Similarity-based copy is the paper's way, the update of the match is our own. ``kept_tokens`` (B, K, C) are the kept
tokens after the last layer of a span, ``source`` (B, N) says which of them each token is refilled from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.method.keep import gather_tokens


def similarity_copy(kept_tokens: Tensor, source: Tensor) -> Tensor:
    """Similarity-based copy: ``out[b] = kept_tokens[source(b)]``, the paper's recovery.

    Args:
        kept_tokens: (B, K, C).
        source: (B, N) int64 positions within K, see `atedm.method.matching`.

    Returns:
        (B, N, C). Differentiable in ``kept_tokens``: a token that is copied often gets that many gradients.
    """
    return gather_tokens(kept_tokens, source)


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


def group_sizes(source: Tensor, kept: int) -> Tensor:
    """How many tokens have each source, themselves included.

    Args:
        source: (B, N) int64 positions within K.
        kept: K.

    Returns:
        (B, K) float32, whatever torch's default: 16 bits do not hold the number of an image's tokens.
    """
    each = torch.ones(source.shape, dtype=torch.float32, device=source.device)
    return each.new_zeros(source.shape[0], kept).scatter_add(1, source, each)


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
    last = last.to(update.dtype)
    mean = mean_by_source(last, source, group_sizes(source, kept))
    return update + share * (last - gather_tokens(mean, source))


def mean_by_source(tokens: Tensor, source: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the tokens that share a source.

    Args:
        tokens: (B, N, C).
        source: (B, N) int64 positions within K.
        sizes: (B, K) float32, how many tokens have each source: `group_sizes`.

    Returns:
        (B, K, C) in the dtype of ``tokens``, summed in float32 or better.
    """
    batch, kept = sizes.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    rows = tokens.to(dtype).flatten(0, 1)
    # Rows of the whole batch at once: adding row to row is many times faster than entry to entry.
    place = (source + kept * torch.arange(batch, device=source.device).unsqueeze(-1)).flatten()
    sums = rows.new_zeros(batch * kept, tokens.shape[2])
    if sums.device.type == "cuda":  # which adds in any order, and would not give the same image twice; this one sorts
        sums = sums.index_put((place,), rows, accumulate=True)
    else:
        sums = sums.index_add(0, place, rows)
    return (torch.unflatten(sums, 0, (batch, kept)) / sizes.unsqueeze(-1)).to(tokens.dtype)


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
