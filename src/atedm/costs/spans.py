"""Arithmetic of the spans of a model under a method, dense and pruned, in one step and over a run.

What a method adds (maps, ranking, matching) is counted by torch, by running the method on tokens without values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from atedm.costs.architectures import WORDS
from atedm.costs.flops import flop_counter
from atedm.costs.macs import Macs, SpanShape, meta
from atedm.costs.tome import ToMe
from atedm.method.contract import Memory, Method, Place, View
from atedm.method.places import function_name


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


def span_shape(unet: UNet2DConditionModel, place: Place, latents: tuple[int, int], words: int = WORDS) -> SpanShape:
    """Return the sizes of one attention block at (height, width) latents."""
    height, width = latents
    for _ in range(place.level - 1):  # a downsampling convolution of stride 2 rounds up
        height, width = -(-height // 2), -(-width // 2)
    layer: Any = unet.get_submodule(place.name).transformer_blocks[0]
    channels = layer.attn1.to_q.in_features
    return SpanShape(place, (height, width), channels, words, layer.attn2.to_k.in_features, layer.attn1.heads)
