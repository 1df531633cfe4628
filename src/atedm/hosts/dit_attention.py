"""What the attention of a transformer block is told: how many tokens each kept one stands for.

Blocks of transformers call `torch.nn.functional.scaled_dot_product_attention` by way of their processors, of which
there is one a family and one more for each adapter. None of them is replaced. While a pruned block runs, a
`TorchFunctionMode` sees the call itself: queries and keys are final there, normed and rotated, whatever LoRA or adapter
has been at work. It adds the logarithm of the counts to the logits, or takes note of the queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atedm.method.contract import QueriesAndKeys

_ATTENTION = functional.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_HEAD_MULTIPLE = 8
"""Fused attention of CUDA wants heads of a multiple of this width."""


class SeenAttention(TorchFunctionMode):
    """Look at the attentions of a block, and lay counts over their keys.

    Args:
        lengths: How many tokens the attentions have whose queries and keys are those of the image, in the order they
            come. Others, such as cross-attention to the text, are left alone.
        offsets: Where in each of these the image tokens begin.
        tokens: K, how many of them there are.
        counts: (B, K) float32, how many tokens each of them stands for; None changes nothing.
        seen: The queries and keys (B, H, K, D) of the image tokens, attention by attention, are added to this list.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        offsets: tuple[int, ...],
        tokens: int,
        counts: Tensor | None,
        seen: list[QueriesAndKeys],
    ) -> None:
        super().__init__()
        self.lengths, self.offsets, self.tokens, self.counts, self.seen = lengths, offsets, tokens, counts, seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        turn = len(self.seen)
        if func is not _ATTENTION or turn == len(self.lengths):
            return func(*args, **kwargs)
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        query, key = given["query"], given["key"]
        if query.shape[-2] != self.lengths[turn] or key.shape[-2] != self.lengths[turn]:
            return func(*args, **kwargs)
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        start = self.offsets[turn]
        image = slice(start, start + self.tokens)
        self.seen.append(QueriesAndKeys(query[..., image, :], key[..., image, :], scale))
        if self.counts is None:
            return func(**given)
        rest = key.shape[-2] - start - self.tokens
        bias = functional.pad(self.counts.log(), (start, rest)).to(query.dtype)[:, None, None]
        mask = given.get("attn_mask")
        if mask is None and query.device.type == "cuda":
            return _with_channel(func, given, bias / scale)
        given["attn_mask"] = _joined(mask, bias)
        return func(**given)


def _joined(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Lay a bias (B, 1, 1, S) over an attention mask of a shape that goes with (B, H, S, S), of bools or added."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias


def _with_channel(func: Callable[..., Any], given: dict[str, Any], column: Tensor) -> Tensor:
    """Attend with one channel more: ones on the queries, ``column`` (B, 1, 1, S) on the keys.

    A mask would make CUDA leave its fastest kernel.
    """
    query, key, value = given["query"], given["key"], given["value"]
    width = query.shape[-1]
    more = -(width + 1) % _HEAD_MULTIPLE
    column = column.transpose(-1, -2).expand(*key.shape[:3], 1).to(key.dtype)
    given["scale"] = given.get("scale") or width**-0.5
    given["query"] = functional.pad(functional.pad(query, (0, 1), value=1.0), (0, more))
    given["key"] = functional.pad(torch.cat([key, column], -1), (0, more))
    given["value"] = functional.pad(value, (0, 1 + more))
    attended: Tensor = func(**given)
    return attended[..., : value.shape[-1]]
