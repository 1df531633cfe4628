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
from torch.nn.attention import SDPBackend, sdpa_kernel

from atedm.costs.flops import flop_counter
from atedm.costs.spans import Macs, SpanShape
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


@dataclass(frozen=True)
class TransformerProfile:
    """What the cost of a transformer at one size depends on, for one image."""

    shapes: tuple[TransformerShape, ...]
    #: MACs outside of the spans, by list of blocks; "in and out" is what is in none.
    rest: Mapping[str, int]


def count_blocks(model: nn.Module, call: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Let torch count one call: all MACs, and those of each block of the family's lists."""
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**call)
    counted = {name.partition(".")[2]: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    blocks = {
        f"{name}.{index}": counted.get(f"{name}.{index}", 0)
        for name in known_family(model).kinds
        for index in range(len(model.get_submodule(name)))  # type: ignore[arg-type]
    }
    return counter.get_total_flops() // 2, blocks


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


def profile_transformer(
    model: nn.Module, config: Mapping[str, Any], size: tuple[int, int], words: int
) -> TransformerProfile:
    """Count a model without weights: dense, and twice with fewer tokens.

    Args:
        model: On the meta device.
        config: Its config, with the class under ``_class_name``.
        size: (h, w) of the image tokens.
        words: Tokens of a caption.
    """
    call = transformer_call(config, size, 1, words, _meta)
    tokens = size[0] * size[1]
    spans = find_transformer_spans(model)
    total, dense = count_blocks(model, call)
    fewer = {}
    for kept in {max(1, tokens // 2), max(1, tokens // 4)} - {tokens}:
        attach_transformer(model, spans, _KeepFirst(kept))
        fewer[kept] = count_blocks(model, call)[1]
        with PATCHING:
            detach_transformer(model)
    rest: dict[str, int] = dict.fromkeys(known_family(model).kinds, 0)
    for name, macs in dense.items():
        rest[name.partition(".")[0]] += macs
    rest["in and out"] = total - sum(rest.values())
    channels, heads = _width(config)
    shapes = []
    for name, (place, blocks) in spans.items():
        stage, _, bounds = name.partition("[")
        first = int(bounds.partition(":")[0])
        inside = [f"{stage}.{index}" for index in range(first, first + len(blocks))]
        growths = tuple(
            _fit({tokens: dense[block], **{kept: counts[block] for kept, counts in fewer.items()}}) for block in inside
        )
        shapes.append(TransformerShape(place, size, channels, words, channels, heads, growths))
        rest[stage] -= sum(dense[block] for block in inside)
    return TransformerProfile(tuple(shapes), rest)


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


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


def _width(config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of a token and heads of the attention."""
    if "dim" in config:
        return config["dim"], config["n_heads"]
    return config["num_attention_heads"] * config["attention_head_dim"], config["num_attention_heads"]
