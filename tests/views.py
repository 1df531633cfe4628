"""Views of an attention block made by hand, for tests of methods without any model."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from atedm.method.contract import Memory, Place, QueriesAndKeys, View

#: SD-XL: two spans in each down stage, three in each up stage, none at the first level (supplement Fig. 3).
SDXL = [
    *[Place("down", 2, i, 2, 2, f"down.1.{i}") for i in range(2)],
    *[Place("down", 3, i, 2, 10, f"down.2.{i}") for i in range(2)],
    Place("mid", 3, 0, 1, 10, "mid.0"),
    *[Place("up", 3, i, 3, 10, f"up.0.{i}") for i in range(3)],
    *[Place("up", 2, i, 3, 2, f"up.1.{i}") for i in range(3)],
]


def view_of(
    size: tuple[int, int] = (4, 6),
    count: int | None = None,
    *,
    batch: int = 2,
    channels: int = 8,
    heads: int = 2,
    words: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    step: int | Tensor = 3,
    seed: int = 0,
    protected: Tensor | None = None,
    memory: Memory | None = None,
) -> View:
    """A view of random tokens; ``count`` is by default a third of them. Queries and keys are made once asked for."""
    number = size[0] * size[1]

    def normal(part: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * seed + part)
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype).to(device)

    @cache
    def attention(part: int, keys: int) -> QueriesAndKeys:
        q, k = normal(part, batch, heads, number, 4), normal(part + 1, batch, heads, keys, 4)
        return QueriesAndKeys(2 * q, k, 0.5)

    return View(
        place=SDXL[2],
        size=size,
        count=max(1, number // 3) if count is None else count,
        step=step,
        tokens=normal(0, batch, number, channels),
        self_attention=lambda: attention(1, number),
        cross_attention=lambda: attention(3, words),
        protected=protected,
        memory=memory,
    )


def after_layers(tokens: Tensor, seed: int = 0) -> Tensor:
    """What the kept tokens might be after the last layer."""
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(tokens.shape, generator=generator, dtype=torch.float32)
    return tokens + noise.to(tokens.dtype).to(tokens.device)


def never() -> Any:
    """Stands in for queries and keys that nobody should ask for."""
    raise AssertionError("no attention is needed here")
