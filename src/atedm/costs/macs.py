"""Arithmetic of the layers of a U-Net's attention blocks, in multiply-accumulates (MACs).

For one image and one layer, N tokens of C channels and T words of width D: the linear projections cost
18 N C^2 + 2 T D C, self-attention 2 N^2 C (the supplement's Eq. 1 with a batch of one and no guidance), cross-attention
2 N T C; the projections into and out of a block 2 N C^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from atedm.method.contract import Place, QueriesAndKeys

#: How MACs are counted: see `Macs`.
CONVENTIONS = ("exact", "paper")


@dataclass(frozen=True)
class SpanShape:
    """Sizes of one span."""

    place: Place
    #: (h, w) of the token grid.
    size: tuple[int, int]
    #: C.
    channels: int
    #: T.
    words: int
    #: D.
    word_width: int
    #: H.
    heads: int = 1

    @property
    def tokens(self) -> int:
        """N."""
        return self.size[0] * self.size[1]

    def ends_macs(self) -> Macs:
        """MACs of what stands before the first layer and after the last, on all tokens."""
        return Macs(linear=2 * self.tokens * self.channels**2)

    def layers_macs(self, first: int, last: int, tokens: int) -> Macs:
        """MACs of the layers from ``first`` to before ``last`` on so many tokens."""
        return layer_macs(self, tokens, tokens, tokens).times(last - first)

    def queries_and_keys(self, tokens: Tensor, context: Tensor) -> QueriesAndKeys:
        """Project queries of ``tokens`` and keys of ``context``, as an attention layer does, without values."""
        projected = (functional.linear(x, meta(self.channels, x.shape[-1])) for x in (tokens, context))
        q, k = (torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2) for x in projected)
        return QueriesAndKeys(q, k, 1.0)


class Macs(NamedTuple):
    """MACs by what they are spent on, for one image.

    Two conventions sum them up. ``exact`` is what `torch.utils.flop_counter` counts (half of its FLOPs): everything.
    ``paper`` is what the paper counts: Linear and convolution, as THOP does, plus self-attention by the supplement's
    Eq. 1; the products of cross-attention and all overheads are left out.
    """

    #: Linear layers.
    linear: int = 0
    #: Both products of self-attention.
    self_attention: int = 0
    #: Both products of cross-attention.
    cross_attention: int = 0
    #: What the dense model does not do: maps, ranking, matching.
    overhead: int = 0

    @property
    def exact(self) -> int:
        """All of it."""
        return sum(self)

    @property
    def paper(self) -> int:
        """Linear and self-attention."""
        return self.linear + self.self_attention

    def by(self, convention: str) -> int:
        """Sum up by one of `CONVENTIONS`."""
        return self.paper if convention == "paper" else self.exact

    def plus(self, *others: Macs) -> Macs:
        """Add up, part by part."""
        return Macs(*map(sum, zip(self, *others, strict=True)))

    def times(self, factor: int) -> Macs:
        """Multiply every part."""
        return Macs(*(factor * part for part in self))


def layer_macs(shape: SpanShape, in_self: int, in_cross: int, in_ff: int) -> Macs:
    """MACs of one layer whose parts run on so many tokens."""
    c, t, d = shape.channels, shape.words, shape.word_width
    return Macs(
        linear=4 * in_self * c * c + 2 * in_cross * c * c + 2 * t * d * c + 12 * in_ff * c * c,
        self_attention=2 * in_self * in_self * c,
        cross_attention=2 * in_cross * t * c,
    )


def meta(*shape: int) -> Tensor:
    """Return a tensor that has a shape and no values."""
    return torch.empty(*shape, device="meta")
