"""The host for diffusers' transformers: SD3, PixArt, FLUX, Qwen-Image, Z-Image, Wan and more (`dit_families`).

A span is a stretch of blocks: all of a list but the first block of the model, which runs on all tokens.
Text tokens are never dropped. Each block of a span gets a class that prunes (`dit_blocks`); putting the old class back
restores everything.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from atedm.hosts.attention import foreign_code, stateful_hook
from atedm.hosts.dit_blocks import BlockState, PrunedBlock, SpanState, pruned_class
from atedm.hosts.dit_families import UNPRUNABLE, Family, Given, Grid, family_of
from atedm.hosts.noise_steps import NoiseSteps
from atedm.hosts.pipeline_schedule import PipelineSchedule
from atedm.hosts.protected import check_room
from atedm.hosts.state import PATCHING, ModelState, is_attached
from atedm.hosts.wrapped import unwrapped
from atedm.method.contract import Method, Place

OLDEST = (0, 40)
"""Release of diffusers from which on blocks are handed what `dit_families` says."""
DENSE_BLOCKS = 1
"""Blocks at the beginning of the model that run on all tokens."""


@dataclass
class TransformerState(ModelState):
    """What the spans of one pruned transformer share."""

    steps: NoiseSteps = field(default_factory=NoiseSteps)
    #: The grid of the tokens by what it was read off, so that a device is waited for once a run.
    grids: dict[Any, tuple[Any, Grid | None]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"grids": {}}


Spans = Mapping[str, tuple[Place, list[nn.Module]]]
"""Place and blocks of every span, by name, in the order they run."""


def find_transformer(target: Any) -> nn.Module | None:
    """Return the transformer of a pipeline, or ``target`` itself, if it is of a family that is known.

    Raises:
        TypeError: If it is a transformer that cannot be pruned.
    """
    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        return None
    name = type(model).__name__
    if name in UNPRUNABLE:
        raise TypeError(f"found a {name}, which cannot be pruned: {UNPRUNABLE[name]}")
    return model if family_of(model) is not None else None


def known_family(model: nn.Module) -> Family:
    """Return the family of a model that is of one."""
    family = family_of(model)
    assert family is not None
    return family


def find_transformer_spans(model: nn.Module) -> Spans:
    """Map the name of every span to its place and blocks, in the order they run."""
    lists = [(name, list(model.get_submodule(name))) for name in known_family(model).kinds]  # type: ignore[call-overload]
    lists = [(name, blocks) for name, blocks in lists if blocks]
    spans: dict[str, tuple[Place, list[nn.Module]]] = {}
    bounds = []
    for index, (name, blocks) in enumerate(lists):
        start = DENSE_BLOCKS if index == 0 else 0
        if len(blocks) > start:
            bounds.append((f"{name}[{start}:{len(blocks)}]", blocks[start:]))
    for index, (name, blocks) in enumerate(bounds):
        spans[name] = (Place("mid", 1, index, len(bounds), len(blocks), name), blocks)
    return spans


def attach_transformer(
    model: nn.Module, spans: Spans, method: Method, protect: Tensor | None = None, pipe: Any = None
) -> None:
    """Let ``method`` prune the chosen ``spans`` of a transformer. ``pipe`` tells the steps if it has a scheduler.

    Raises:
        TypeError: If a block is of a class that is not known, or diffusers is older than `OLDEST`.
        ValueError: If it is pruned already, or a block cannot be pruned as it is. Nothing has been changed then.
    """
    if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < OLDEST:
        raise TypeError(
            f"diffusers {diffusers.__version__} hands its transformer blocks other arguments than this host knows; "
            f"install diffusers {'.'.join(map(str, OLDEST))} or newer"
        )
    family = known_family(model)
    kinds = {name: family.kinds[name.partition("[")[0]] for name in spans}
    for name, (_, blocks) in spans.items():
        for block in blocks:
            _refuse_unknown(name, block, {kinds[name].image, *filter(None, [kinds[name].text])})
    state = TransformerState(method, tuple(spans), protect=protect, steps=NoiseSteps(PipelineSchedule(pipe)))
    with PATCHING:
        for name, (place, blocks) in spans.items():
            span = SpanState(place, kinds[name], state)
            for index, block in enumerate(blocks):
                block._atedm = BlockState(span, index)  # type: ignore[assignment]
                block.__class__ = pruned_class(type(block))
        model._atedm = state  # type: ignore[assignment]
        model._atedm_hooks = (  # type: ignore[assignment]
            model.register_forward_pre_hook(before_transformer, with_kwargs=True),
            model.register_forward_hook(after_transformer, always_call=True),
        )


def detach_transformer(model: Any) -> None:
    """Undo `attach_transformer`: the transformer is exactly as before. Call it with `PATCHING` held."""
    for block in model.modules():
        if isinstance(block, PrunedBlock):
            block.__class__ = type(block)._base  # type: ignore[assignment]
            del block._atedm
    for hook in model._atedm_hooks:
        hook.remove()
    del model._atedm_hooks, model._atedm


def _refuse_unknown(name: str, block: nn.Module, arguments: set[str]) -> None:
    kind = type(block)
    if not kind.__module__.startswith("diffusers.") or not arguments <= {*inspect.signature(kind.forward).parameters}:
        raise TypeError(
            f"a block of {name} is a {kind.__qualname__} of {kind.__module__}, which is not known here; this host is "
            "written for diffusers 0.40 to 0.42"
        )
    if "forward" in vars(block):
        raise ValueError(
            f"the forward of a block of {name} is already overridden on the instance (by another patch, or by an "
            "offload hook); apply atedm first, then that"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_transformer(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the spans where the step stands, and refuse what cannot be honoured. A forward pre-hook of the model."""
    names = [*inspect.signature(type(model).forward).parameters][1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    family, state = known_family(model), model._atedm
    assert isinstance(state, TransformerState)
    if given.get(family.timestep) is None:
        return  # the call fails at once, and diffusers says why
    _refuse_at_call(model, given)
    with PATCHING:
        state.caller.begin()
    position, context = state.steps.locate(given[family.timestep], family.noise, given.get(family.text))
    state.step = torch.tensor(position.step, device="cpu")
    state.early = state.method.is_early(position.share)
    grid = _grid_of(state, family, model, given)
    why_dense = _why_dense(model, family, given, grid)
    if why_dense is not None:
        _say_once(type(model).__name__, why_dense)
    if state.protect is not None and grid is not None and why_dense is None:
        _check_protected(state, model, grid)
    grid = grid or Grid((1, 1))
    for name in state.spans:
        span = _span(model, name)
        dense = why_dense is not None or state.method.count(span.place, grid.tokens, early=state.early) == grid.tokens
        span.begin_call(grid, context.memory_of(name), is_dense=dense)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def after_transformer(model: Any, *_: Any) -> None:
    """Let other threads call the model. A forward hook that is called after an exception as well."""
    if is_attached(model) and model._atedm.caller.is_this_thread:
        for name in model._atedm.spans:
            _span(model, name).end_call()
        model._atedm.caller.end()


def _blocks(model: nn.Module, name: str) -> list[Any]:
    """Blocks of a span, whose name is that of their list and their bounds in it."""
    blocks, _, bounds = name.partition("[")
    start, end = map(int, bounds.rstrip("]").split(":"))
    return [*model.get_submodule(blocks)][start:end]  # type: ignore[misc]


def _first_block(model: nn.Module, name: str) -> Any:
    return _blocks(model, name)[0]


def _span(model: nn.Module, name: str) -> SpanState:
    span: SpanState = _first_block(model, name)._atedm.span
    return span


def _grid_of(state: TransformerState, family: Family, model: nn.Module, given: Given) -> Grid | None:
    ids = given.get("img_ids")
    if not isinstance(ids, Tensor) or ids.device.type == "meta":
        return family.grid(model, given)
    key = (ids.data_ptr(), tuple(ids.shape), ids._version)
    if key not in state.grids:
        state.grids.clear()
        state.grids[key] = (ids, family.grid(model, given))  # the ids are held, so that no others take their place
    return state.grids[key][1]


def _refuse_at_call(model: nn.Module, given: Given) -> None:
    """Raise if a call asks for something that pruning cannot honour."""
    if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
        raise ValueError(
            "gradient checkpointing runs blocks again on their own, which a pruned transformer cannot; call "
            "disable_gradient_checkpointing(), or atedm.remove"
        )
    for name in ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"):
        if (given.get(name) or {}).get("ip_adapter_masks") is not None:
            raise ValueError(
                "ip_adapter_masks are laid over the tokens by their number, which pruning changes; "
                "call atedm.remove first, or leave the masks out"
            )
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError("context parallelism splits the tokens over devices, which pruning does not know; remove one")


def _why_dense(model: nn.Module, family: Family, given: Given, grid: Grid | None) -> str | None:
    """Say why a call has to run on all tokens; None if it need not."""
    for name, why in family.dense_with:
        if given.get(name) is not None and given.get(name) != []:
            return f"{why} ({name})"
    if grid is None:
        return "its images are of several sizes"
    timestep = given[family.timestep]
    if isinstance(timestep, Tensor) and timestep.ndim > 1 and timestep.shape[1] > 1:
        return "each token has a timestep of its own"
    state: Any = model._atedm
    for name in state.spans:
        for inner, module in _first_block(model, name).named_modules():  # caches are laid over all blocks alike
            if inner and (cache := stateful_hook(module)):
                return f"{cache} keeps what parts of its blocks gave for other tokens"
        if (foreign := foreign_code(_parts(_blocks(model, name)))) is not None:
            return f"{foreign} is not diffusers' own and may read tokens by their place"
    return None


def _parts(blocks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for block in blocks:
        yield "a block", block
        for name, module in block.named_children():
            if "processor" in vars(module):
                yield name, module


@functools.cache
def _say_once(model: str, why: str) -> None:
    logging.getLogger("atedm").warning("a call of %s is left dense: %s.", model, why)


def _check_protected(state: TransformerState, model: nn.Module, grid: Grid) -> None:
    if grid.size in state.with_room:
        return
    if not grid.is_picture:
        raise ValueError("protect lays a mask over one picture, and the tokens of this call are several, or a video")
    assert state.protect is not None
    check_room(state.method, {_span(model, name).place: grid.size for name in state.spans}, state.protect)
    state.with_room.add(grid.size)


def check_protected_transformer(model: nn.Module, size: tuple[int, int]) -> None:
    """See that no span will keep fewer tokens than are protected, at (height, width) latents.

    Raises:
        ValueError: If one will.
    """
    state = model._atedm
    assert isinstance(state, TransformerState)
    if state.protect is not None:
        side = known_family(model).side
        _check_protected(state, model, Grid((size[0] // side, size[1] // side)))
