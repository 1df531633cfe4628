"""A transformer block of diffusers, pruned: the same object with its class swapped for a subclass made here.

A span is a stretch of blocks. Its first block drops tokens, all of its blocks run on those that are left, and its last
block refills. In between the tokens go through the model's own loop. Weights, hooks, adapters and processors stay as
they are, and the blocks run diffusers' own code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from atedm.hosts.dit_attention import SeenAttention
from atedm.hosts.dit_families import FAMILIES, Grid, Kind, Table
from atedm.hosts.state import ModelState
from atedm.method.contract import Cut, Memory, Place, QueriesAndKeys, View
from atedm.method.keep import gather_tokens
from atedm.method.protection import protected_tokens


@dataclass
class SpanState:
    """What the blocks of one span share. All but ``memory`` is of one call."""

    place: Place
    kind: Kind
    model: ModelState
    #: Of the context of the call.
    memory: Memory = field(default_factory=Memory)
    grid: Grid = field(default_factory=lambda: Grid((1, 1)))
    #: Whether the span drops nothing in this call.
    is_dense: bool = True
    #: Image tokens before the first block of a span that drops nothing and remembers what it does; (B, N, C).
    before: Tensor | None = None
    attention: QueriesAndKeys | None = None
    cut: Cut | None = None
    #: Tables of the call by name: as they were handed over, and the rows of the tokens that are left.
    rows: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def begin_call(self, grid: Grid, memory: Memory, *, is_dense: bool) -> None:
        """Forget the last call, ended or not, and learn of the next."""
        self.grid, self.memory, self.is_dense = grid, memory, is_dense
        self.end_call()

    def end_call(self) -> None:
        """Let go of the tensors of a call."""
        self.before = self.attention = self.cut = None
        self.rows = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model starts with nothing.
        return vars(SpanState(self.place, self.kind, self.model))


@dataclass
class BlockState:
    """What one block of a span knows."""

    span: SpanState
    #: Which of its span it is, from 0.
    index: int

    @property
    def is_last(self) -> bool:
        """Whether the span ends here."""
        return self.index == self.span.place.layers - 1


class PrunedBlock(nn.Module):
    """What `pruned_class` mixes into a class of blocks."""

    _atedm: BlockState
    _names: tuple[str, ...] = ()
    _base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block as diffusers does, on the tokens that are left."""
        # Hooks that were laid over this method (of an offload, say) go on calling it when the patch is gone.
        state: BlockState | None = vars(self).get("_atedm")
        block = super().forward
        if state is None:
            return block(*args, **kwargs)
        given = dict(zip(self._names, args, strict=False)) | kwargs
        return run_dense(state, block, given) if state.span.is_dense else run_pruned(state, block, given)


def run_dense(state: BlockState, block: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Run a block of a span that drops nothing in this call, and let the method remember what the span did."""
    span, method = state.span, state.span.model.method
    remember = getattr(method, "remember_dense", None) if method.remembers else None
    if remember is None:
        return block(**given)
    if state.index == 0:
        span.before = _image_of(span, given[span.kind.image])
    returned = block(**given)
    if state.is_last and span.before is not None:
        remember(span.before, _image_of(span, _returned_image(span.kind, returned)), span.memory)
        span.before = None
    return returned


def run_pruned(state: BlockState, block: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Run a block of a span that drops tokens before its first block, or after as many as the method runs dense."""
    span, kind = state.span, state.span.kind
    dense = span.model.method.dense_layers
    hidden: Tensor = given[kind.image]
    if state.index < dense:
        text = hidden.shape[1] - span.grid.tokens if kind.joined else _text_length(kind, given)
        with _attention(kind, text, span.grid.tokens, None) as seen:
            returned = block(**given)
        if state.index == 0:
            span.attention = _first(seen)
        return returned
    if state.index == dense:
        _drop(span, _image_of(span, hidden))
    cut = span.cut
    if cut is None:
        raise RuntimeError(f"the blocks of {span.place.name} did not run one after another, which pruning needs")
    kept = cut.tokens.shape[1]
    if kind.joined:
        text = hidden.shape[1] - (span.grid.tokens if state.index == dense else kept)
        hidden = _with_image(kind, hidden, text, cut.tokens) if state.index == dense else hidden
    else:
        text = _text_length(kind, given)
        hidden = cut.tokens if state.index == dense else hidden
    given[kind.image] = hidden
    for table in kind.tables:
        value = given.get(table.name)
        if value is None:
            continue
        if table.name not in span.rows or span.rows[table.name][0] is not value:  # the same for all blocks, as a rule
            rows = rows_of(table, value, cut.keep, span.grid.tokens, text, kind.attends[0])
            span.rows[table.name] = (value, rows)
        given[table.name] = span.rows[table.name][1]
    with _attention(kind, text, kept, cut.weights) as seen:
        returned = block(**given)
    _first(seen)
    if state.is_last:
        image = _returned_image(kind, returned)
        start = _image_start(kind, text)
        full = cut.refill(image[:, start : start + kept] if kind.joined else image)
        if kind.joined:
            full = _with_image(kind, image, text, full)
        returned = full if kind.returns is None else _replaced(returned, kind.returns, full)
        span.end_call()
    return returned


def _drop(span: SpanState, tokens: Tensor) -> None:
    """Let the method choose among (B, N, C) tokens."""
    model, method = span.model, span.model.method
    protect = None if model.protect is None else protected_tokens(model.protect, span.grid.size).to(tokens.device)
    span.cut = method.drop(
        View(
            place=span.place,
            size=span.grid.size,
            count=method.count(span.place, tokens.shape[1], early=model.early),
            step=model.step,
            tokens=tokens,
            self_attention=functools.partial(_known, span.attention),
            cross_attention=functools.partial(_known, None),
            protected=protect,
            memory=span.memory,
            one_set=span.kind.one_set,
        )
    )
    model.observe(span.place.name, method.dense_layers, span.cut, span.grid.size)


def _known(attention: QueriesAndKeys | None) -> QueriesAndKeys:
    if attention is None:
        raise ValueError(
            "a transformer shows the queries and keys of its first block only to methods that run it dense"
        )
    return attention


def rows_of(table: Table, value: Any, keep: Tensor, tokens: int, text: int, order: str) -> Any:
    """Return the rows of a table that belong to the kept image tokens and to all text tokens.

    Args:
        table: What the argument is.
        value: The argument: a tensor with the tokens on one axis, a tuple of such, or None.
        keep: (B, K) int64, which image tokens are kept.
        tokens: N, image tokens of the table.
        text: Text tokens of the table, if it has any.
        order: "text image", "image text" or "image", as they follow one another.
    """
    if table.part is not None:
        parts = list(value)
        parts[table.part] = rows_of(replace(table, part=None), parts[table.part], keep, tokens, text, order)
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, list | tuple):
        return type(value)(rows_of(table, part, keep, tokens, text, order) for part in value)
    if not isinstance(value, Tensor):
        return value
    if table.of == "tail":
        fewer = tokens - keep.shape[1]
        return value.narrow(table.axis, fewer, value.shape[table.axis] - fewer)
    rows = keep
    if table.of == "all":
        of_text = torch.arange(text, device=keep.device).expand(keep.shape[0], text)
        text_first = order.startswith("text")
        rows = torch.cat([of_text, keep + text] if text_first else [keep, of_text + tokens], dim=1)
    if table.axis == 0:
        return value.index_select(0, rows[0])
    return gather_tokens(value.expand(keep.shape[0], *value.shape[1:]), rows)


@contextmanager
def _attention(kind: Kind, text: int, tokens: int, counts: Tensor | None) -> Iterator[list[QueriesAndKeys]]:
    """Lay counts over the keys of a block's attentions, and list what these compare."""
    lengths = tuple(tokens if keys == "image" else text + tokens for keys in kind.attends)
    offsets = tuple(text if keys.startswith("text") else 0 for keys in kind.attends)
    seen: list[QueriesAndKeys] = []
    with SeenAttention(lengths, offsets, tokens, counts, seen):
        yield seen


def _first(seen: list[QueriesAndKeys]) -> QueriesAndKeys:
    if not seen:
        raise RuntimeError(
            "the attention of a pruned block did not go through torch's scaled_dot_product_attention, so it cannot be "
            "told how many tokens each kept one stands for; call transformer.set_attention_backend('native')"
        )
    return seen[0]


def _text_length(kind: Kind, given: dict[str, Any]) -> int:
    return 0 if kind.text is None else int(given[kind.text].shape[1])


def _image_start(kind: Kind, text: int) -> int:
    return text if kind.attends[0].startswith("text") else 0


def _image_of(span: SpanState, hidden: Tensor) -> Tensor:
    """Image tokens (B, N, C) of what a dense block is handed or returns."""
    if not span.kind.joined:
        return hidden
    start = _image_start(span.kind, hidden.shape[1] - span.grid.tokens)
    return hidden[:, start : start + span.grid.tokens]


def _with_image(kind: Kind, hidden: Tensor, text: int, image: Tensor) -> Tensor:
    """Put other image tokens in place of those of a joined sequence."""
    if kind.attends[0].startswith("text"):
        return torch.cat([hidden[:, :text], image], dim=1)
    return torch.cat([image, hidden[:, hidden.shape[1] - text :]], dim=1)


def _returned_image(kind: Kind, returned: Any) -> Tensor:
    image: Tensor = returned if kind.returns is None else returned[kind.returns]
    return image


def _replaced(returned: tuple[Any, ...], index: int, image: Tensor) -> tuple[Any, ...]:
    return (*returned[:index], image, *returned[index + 1 :])


_MADE: dict[type, Any] = {}


def pruned_class(base: Any) -> Any:
    """Return the subclass of a class of blocks that prunes; the same for each.

    It goes by the name of its base, by which diffusers finds the blocks it compiles one by one.
    """
    if base in _MADE:
        return _MADE[base]
    names = tuple(inspect.signature(base.forward).parameters)[1:]
    of = {"_names": names, "_base": base, "__module__": __name__, "__qualname__": f"Pruned{base.__name__}"}
    made = type(base.__name__, (PrunedBlock, base), of)
    _tell_caches(base, made)
    _MADE[base] = made
    return made


def _tell_caches(base: type[nn.Module], made: type[nn.Module]) -> None:
    """Let the caches of diffusers know the pruned class as they know its base."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        known = TransformerBlockRegistry.get(base)
    except (ImportError, ValueError):
        return
    values = {name: value for name, value in vars(known).items() if not name.startswith("_")}
    TransformerBlockRegistry.register(made, type(known)(**values))


def __getattr__(name: str) -> Any:
    """Find a pruned class by name, for pickle, in a process that has made none yet."""
    wanted = name.removeprefix("Pruned")
    if wanted != name:
        from importlib import import_module

        for family in FAMILIES.values():
            try:
                module = import_module(f"diffusers.models.transformers.{family.module}")
            except ImportError:
                continue
            base = getattr(module, wanted, None)
            if isinstance(base, type) and issubclass(base, nn.Module):
                return pruned_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
