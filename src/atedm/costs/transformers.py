"""Arithmetic of transformers: what torch counts on three numbers of tokens says what each block costs on any.

A block that runs on n image tokens and a fixed text takes a + b n + c n^2 MACs: its linear layers grow with n, the
products of its attention with the square. Three counts give a, b and c exactly, whatever the block consists of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atedm.costs.counting import StageCost
from atedm.costs.flops import macs_by_module
from atedm.costs.macs import Macs, SpanShape, meta
from atedm.costs.transformer_calls import transformer_call
from atedm.hosts.diffusers_dit import attach_transformer, detach_transformer, find_transformer_spans, known_family
from atedm.hosts.state import PATCHING
from atedm.method.contract import Cut, Place, QueriesAndKeys, View


class Growth(NamedTuple):
    """MACs of a block on n image tokens: ``constant + linear n + square n^2``."""

    constant: int
    linear: int
    square: int


@dataclass(frozen=True)
class TransformerShape(SpanShape):
    """Sizes of a stretch of blocks, which need not all be alike."""

    blocks: tuple[Growth, ...] = ()

    def ends_macs(self) -> Macs:
        """Nothing: tokens come and go as they are."""
        return Macs()

    def layers_macs(self, first: int, last: int, tokens: int) -> Macs:
        """MACs of the blocks from ``first`` to before ``last`` on so many image tokens and all text tokens."""
        blocks = self.blocks[first:last]
        linear = sum(block.constant + block.linear * tokens for block in blocks)
        return Macs(linear=linear, self_attention=sum(block.square for block in blocks) * tokens**2)

    def queries_and_keys(self, tokens: Tensor, context: Tensor) -> QueriesAndKeys:
        """Queries and keys are those of the first block, which are there already."""
        heads = self.heads
        q, k = (x.new_empty(x.shape[0], heads, x.shape[1], self.channels // heads) for x in (tokens, context))
        return QueriesAndKeys(q, k, 1.0)


def count_blocks(model: nn.Module, call: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Let torch count one call: all MACs, and those of each block of the family's lists."""
    total, by_module = macs_by_module(lambda: model(**call))
    blocks = [
        f"{name}.{index}"
        for name in known_family(model).kinds
        for index in range(len(model.get_submodule(name)))  # type: ignore[arg-type]
    ]
    return total, {block: by_module[block] for block in blocks}


@dataclass(frozen=True)
class _KeepFirst:
    """Keeps the first tokens, and does no arithmetic of its own."""

    kept: int
    rate: float = 0.5

    name, dense_layers, remembers = "counting", 0, False

    def is_early(self, share: float) -> bool:
        return False

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        return self.kept

    def drop(self, view: View) -> Cut:
        tokens = view.tokens[:, : self.kept]
        keep = torch.empty(tokens.shape[:2], dtype=torch.long, device="meta")
        return Cut(tokens, keep, tokens[..., 0], lambda kept: torch.cat([kept, view.tokens[:, self.kept :]], 1))

    def as_dict(self) -> dict[str, Any]:
        return {}


def transformer_shapes(
    model: nn.Module, config: Mapping[str, Any], size: tuple[int, int], words: int
) -> tuple[int, tuple[TransformerShape, ...], tuple[StageCost, ...]]:
    """Count a model without weights: dense, and twice with fewer tokens.

    Args:
        model: On the meta device.
        config: Its config, with the class under ``_class_name``.
        size: (h, w) of the image tokens.
        words: Tokens of a caption.

    Returns:
        For one image all MACs, the spans, and what is outside of them by list of blocks.
    """
    call, tokens = transformer_call(config, size, 1, words, meta), size[0] * size[1]
    spans, (total, dense) = find_transformer_spans(model), count_blocks(model, call)
    counts = {tokens: dense}
    for kept in {max(1, tokens // 2), max(1, tokens // 4)} - {tokens}:
        attach_transformer(model, spans, _KeepFirst(kept))
        counts[kept] = count_blocks(model, call)[1]
        with PATCHING:
            detach_transformer(model)
    shapes, outside = [], dense.copy()
    heads = config["n_heads"] if "dim" in config else config["num_attention_heads"]
    channels = config["dim"] if "dim" in config else heads * config["attention_head_dim"]
    for name, (place, blocks) in spans.items():
        kind, _, bounds = name.partition("[")
        first = int(bounds.partition(":")[0])
        inside = [f"{kind}.{index}" for index in range(first, first + len(blocks))]
        growths = tuple(_fit({kept: of_block[block] for kept, of_block in counts.items()}) for block in inside)
        shapes.append(TransformerShape(place, size, channels, words, channels, heads, growths))
        outside |= dict.fromkeys(inside, 0)
    stages = [
        StageCost(kind, 0, sum(macs for block, macs in outside.items() if block.rpartition(".")[0] == kind))
        for kind in known_family(model).kinds
    ]
    return total, tuple(shapes), (*stages, StageCost("in and out", 0, total - sum(dense.values())))


def _fit(counts: Mapping[int, int]) -> Growth:
    """Return the parabola through three counts, by Newton's differences; of fewer counts, nothing but the first."""
    if len(counts) < 3:
        return Growth(next(iter(counts.values())), 0, 0)
    (x0, y0), (x1, y1), (x2, y2) = counts.items()
    slope = Fraction(y1 - y0, x1 - x0)
    square = (Fraction(y2 - y1, x2 - x1) - slope) / (x2 - x0)
    linear = slope - square * (x0 + x1)
    constant = y0 - linear * x0 - square * x0**2
    return Growth(*(int(x) for x in (constant, linear, square)))
