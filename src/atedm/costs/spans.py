"""Arithmetic of spans of a U-Net, in multiply-accumulates (MACs), dense and pruned.

For one image and one layer, N tokens of C channels and T words of width D: the linear projections cost
18 N C^2 + 2 T D C, self-attention 2 N^2 C (the supplement's Eq. 1 with a batch of one and no guidance), cross-attention
2 N T C; the projections into and out of a block 2 N C^2. What a method adds (maps, ranking, matching) is counted by
torch, by running the method on tokens without values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from atedm.costs.architectures import WORDS
from atedm.costs.flops import flop_counter
from atedm.method.contract import Memory, Method, Place, QueriesAndKeys, View
from atedm.method.places import function_name

if TYPE_CHECKING:
    from atedm.costs.tome import ToMe

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


def span_macs(shape: SpanShape, method: Method | ToMe | None = None, *, early: bool = False) -> Macs:
    """MACs of one span in one step for one image; dense without a ``method``, or where it does not prune.

    ToMe, and a method whose layers run on several numbers of tokens, say themselves what they cost.
    """
    if method is not None and hasattr(method, "span_macs"):
        own: Macs = method.span_macs(shape, early=early)
        return own
    n, layers = shape.tokens, shape.place.layers
    total = shape.ends_macs()
    kept = n if method is None else method.count(shape.place, n, early=early)
    if method is None or kept == n:
        return total.plus(shape.layers_macs(0, layers, n))
    dense = method.dense_layers
    return total.plus(
        shape.layers_macs(0, dense, n),
        shape.layers_macs(dense, layers, kept),
        Macs(overhead=meta_overhead(method, shape, kept, tokens=n)),
    )


def span_run_macs(shape: SpanShape, method: Method | ToMe, steps: int) -> Macs:
    """Sum of `span_macs` over a run of ``steps`` steps."""
    if hasattr(method, "span_run_macs"):
        own: Macs = method.span_run_macs(shape, steps)
        return own
    early = early_steps(method, steps)
    return span_macs(shape, method, early=True).times(early).plus(span_macs(shape, method).times(steps - early))


def early_steps(method: Method | ToMe, steps: int) -> int:
    """How many of the ``steps`` steps of a run are early."""
    return sum(method.is_early(step / steps) for step in range(steps))


def step_macs(shapes: Sequence[SpanShape], method: Method | ToMe | None = None, *, early: bool = False) -> Macs:
    """MACs of all spans in one step for one image."""
    return Macs().plus(*(span_macs(shape, method, early=early) for shape in shapes))


def mean_macs(shapes: Sequence[SpanShape], method: Method | ToMe, steps: int, convention: str = "exact") -> float:
    """Mean MACs of all spans over a run of ``steps`` steps for one image, by one of `CONVENTIONS`."""
    return sum(span_run_macs(shape, method, steps).by(convention) for shape in shapes) / steps


def meta_overhead(method: Method, shape: SpanShape, kept: int, *, tokens: int) -> int:
    """MACs that dropping and refilling add in one span of which ``tokens`` are left, counted by torch without values.

    The same is counted once, whatever the rate of ``method`` and the place. Functions of the user's own that need
    values cannot be counted this way: they are left out, and a warning says so.
    """
    anywhere = replace(shape.place, name="", index=0, count=1)
    method = replace(method, rate=0.0)  # type: ignore[type-var]
    counted: int = _meta_overhead(method, replace(shape, place=anywhere), kept, tokens)  # type: ignore[arg-type]
    return counted


@functools.lru_cache(maxsize=4096)
def _meta_overhead(method: Method, shape: SpanShape, kept: int, tokens: int) -> int:
    with torch.no_grad(), flop_counter() as counter:
        function = getattr(method, "rank", None)
        try:
            cut = method.drop(_meta_view(shape, kept, tokens, remembers=method.remembers))
            function = getattr(method, "refill", None)
            cut.refill(cut.tokens)
        except (RuntimeError, NotImplementedError) as error:
            if not callable(function):
                raise
            _say_once(function_name(function), str(error).partition("\n")[0])
    return int(counter.get_total_flops()) // 2


@functools.cache
def _say_once(function: str, reason: str) -> None:
    logging.getLogger("atedm").warning(
        "%s needs the values of tokens, so its cost and that of what comes after it is left out (%s).",
        function,
        reason,
    )


def _meta_view(shape: SpanShape, kept: int, number: int, *, remembers: bool) -> View:
    """Return a view of a span of one image whose tensors have sizes and no values."""
    tokens = meta(1, number, shape.channels)
    return View(
        place=shape.place,
        size=shape.size,
        count=kept,
        step=0,
        tokens=tokens,
        self_attention=functools.partial(shape.queries_and_keys, tokens, tokens),
        cross_attention=functools.partial(shape.queries_and_keys, tokens, meta(1, shape.words, shape.word_width)),
        memory=Memory(last=tokens) if remembers else None,
    )


def meta(*shape: int) -> Tensor:
    """Return a tensor that has a shape and no values."""
    return torch.empty(*shape, device="meta")


def span_shape(unet: UNet2DConditionModel, place: Place, latents: tuple[int, int], words: int = WORDS) -> SpanShape:
    """Return the sizes of one attention block at (height, width) latents."""
    height, width = latents
    for _ in range(place.level - 1):  # a downsampling convolution of stride 2 rounds up
        height, width = -(-height // 2), -(-width // 2)
    layer: Any = unet.get_submodule(place.name).transformer_blocks[0]
    channels = layer.attn1.to_q.in_features
    return SpanShape(place, (height, width), channels, words, layer.attn2.to_k.in_features, layer.attn1.heads)
