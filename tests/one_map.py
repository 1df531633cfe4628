"""Watches that attention maps are made one at a time: whole maps of a large model fill the memory."""

import weakref
from collections.abc import Iterator
from types import ModuleType

import pytest
from torch import Tensor

from atedm.method.attention_map import attention_maps


def watch_maps(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """Put in place of a module's ``maps_in_turn`` one that fails while the map before is alive; gives its heads."""
    freed: list[int] = []

    def watched(q: Tensor, k: Tensor, scale: float) -> Iterator[Tensor]:
        for head, (q_head, k_head) in enumerate(zip(q.unbind(1), k.unbind(1), strict=True)):
            a = next(attention_maps(q_head[:, None], k_head[:, None], scale))
            reference = weakref.ref(a)
            yield a
            del a
            assert reference() is None, "the previous map is alive while the next one is made"
            freed.append(head)

    monkeypatch.setattr(module, "maps_in_turn", watched)
    return freed
