"""What the spans of a model add to their tokens when nothing is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atedm.hosts.models import attach, detach, is_transformer, spans_of
from atedm.hosts.unet_spans import choose_spans
from atedm.method.contract import Cut, Memory, Method, Place, View


@dataclass(frozen=True)
class _Watch:
    """Drops nothing, and notes what each span gives, in the order they run."""

    method: Method
    rate: float = 0.5
    given: list[Tensor] = field(default_factory=list)

    name = "nothing dropped"
    dense_layers = 0
    remembers = True

    def is_early(self, share: float) -> bool:
        return True

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        return tokens if early else self.method.count(place, tokens)

    def drop(self, view: View) -> Cut:
        raise AssertionError("all steps are dense")

    def remember_dense(self, before: Tensor, after: Tensor, memory: Memory) -> None:
        self.given.append(after - before)

    def as_dict(self) -> dict[str, Any]:
        return {"method": "none"}


@torch.no_grad()
def run_dense(
    model: Any, method: Method, arguments: tuple[Any, ...], options: Mapping[str, Any], pipe: Any = None
) -> dict[str, Tensor]:
    """Call a model that is not patched; return what each span that ``method`` prunes adds, (B, N, C)."""
    if is_transformer(model):
        watch = _Watch(method)
        attach(model, watch, pipe=pipe)
        try:
            names = model._atedm.spans
            model(*arguments, **options)
        finally:
            detach(model)
        return dict(zip(names, watch.given, strict=True))
    given: dict[str, Tensor] = {}
    hooks = []
    for name, (_, block) in choose_spans(spans_of(model), method).items():
        layers = block.transformer_blocks
        hooks.append(layers[0].register_forward_pre_hook(partial(_begin, given, name), with_kwargs=True))
        hooks.append(layers[-1].register_forward_hook(partial(_end, given, name)))
    try:
        model(*arguments, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _begin(given: dict[str, Tensor], name: str, _: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    given[name] = arguments[0] if arguments else options["hidden_states"]


def _end(given: dict[str, Tensor], name: str, _: Any, __: Any, output: Tensor) -> None:
    given[name] = output - given[name]
