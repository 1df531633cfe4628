"""Torch's counter of operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which does not know the CPU's fused attention before torch 2.15."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: _attention_flop})


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of fused attention, from shapes; torch hands over the other arguments as well."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
