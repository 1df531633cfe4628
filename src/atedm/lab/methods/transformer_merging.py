"""ToMe in a transformer: tomesd's matching in each block of the spans, around its attention and its feed-forward.

tomesd itself patches U-Nets only. This does in SD3's blocks what it does there: a block matches its tokens once,
attention and feed-forward run on the merged ones, and what they say is copied back. The blocks are those that pruning
works on, so that both leave the first block of the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from atedm.hosts.diffusers_dit import find_transformer_spans, known_family
from atedm.lab.extra import optional

_ToMerge: TypeAlias = Callable[[Tensor], Tensor]

_CELL = 2
"""Of each 2 x 2 tokens one is a destination, as by default in tomesd."""


@contextmanager
def merged_blocks(model: nn.Module, ratio: float, seed: int) -> Iterator[None]:
    """Merge the share ``ratio`` of the image tokens in every block of the spans.

    Args:
        model: Transformer of SD3's class.
        ratio: At most 0.75, the share of tokens that are no destinations.
        seed: Of the destinations, which are drawn anew in every block of every step.

    Raises:
        ValueError: If the blocks are of another class.
    """
    blocks = [block for _, blocks in find_transformer_spans(model).values() for block in blocks]
    for block in blocks:
        if type(block).__name__ != "JointTransformerBlock":
            raise ValueError(f"ToMe is written for the blocks of SD3 here, and not for a {type(block).__name__}")
    matching = optional("tomesd.merge", "peers").bipartite_soft_matching_random2d
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (1, 1)

    def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal size
        given = kwargs if not args else {"hidden_states": args[0]} | kwargs
        grid = known_family(model).grid(model, given)
        assert grid is not None  # SD3 takes one size of images a call
        size = grid.size

    hooks = [model.register_forward_pre_hook(measure, with_kwargs=True)]

    def match(tokens: Tensor) -> tuple[_ToMerge, _ToMerge]:
        merging = int(tokens.shape[1] * ratio)
        return matching(tokens, size[1], size[0], _CELL, _CELL, merging, generator=generator)  # type: ignore[no-any-return]

    for block in blocks:
        hooks += _merge_in(block, match)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _merge_in(block: Any, match: Callable[[Tensor], tuple[_ToMerge, _ToMerge]]) -> list[Any]:
    """Register the hooks of one block."""
    merge: _ToMerge
    unmerge: _ToMerge

    def choose(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal merge, unmerge
        merge, unmerge = match(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def fewer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (merge(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": merge(kwargs["hidden_states"])}

    def all_again(_: nn.Module, __: Any, returned: Any) -> Any:
        if isinstance(returned, tuple):  # of image and text
            return unmerge(returned[0]), *returned[1:]
        return unmerge(returned)

    hooks = [block.register_forward_pre_hook(choose, with_kwargs=True)]
    for part in filter(None, (block.attn, block.attn2, block.ff)):
        hooks += [part.register_forward_pre_hook(fewer, with_kwargs=True), part.register_forward_hook(all_again)]
    return hooks
