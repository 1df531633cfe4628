"""Torch's counter of operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which does not know the CPU's fused attention before torch 2.15."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: _attention_flop})


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of fused attention, from shapes; torch hands over the other arguments as well."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def macs_by_module(call: Callable[[], object]) -> tuple[int, Counter[str]]:
    """Let torch count a call of a model: all MACs, and those of every submodule by its name.

    On the meta device nothing is computed, and the largest U-Net takes seconds.
    """
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    by_name = {name.partition(".")[2]: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops() // 2, Counter(by_name)
