"""Look into the first layer of every attention block while a pipeline draws dense, and leave the images as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from atedm.generate import Progress
from atedm.patching.apply import is_applied
from atedm.patching.pruning_layer import queries_and_keys
from atedm.patching.survey import find_blocks, find_unet
from atedm.pruning import keep_count
from atedm.schedule import BlockPlace
from atedm.token_ranking import QueriesAndKeys


class FirstLayer(NamedTuple):
    """What the first layer of a block did in one call of the U-Net, where the prompt is known, in float32."""

    block: str
    #: Index of the call, from 0.
    step: int
    #: What left the layer, (B, N, C).
    tokens: Tensor
    self_attention: QueriesAndKeys
    cross_attention: QueriesAndKeys
    #: (h, w) of the grid.
    size: tuple[int, int]


def kept_of(layer: FirstLayer, pruning_rate: float) -> int:
    """How many tokens of a layer stay at a pruning rate.

    Raises:
        ValueError: If all do, because then there are no dropped ones to look at; the message says what works.
    """
    tokens = layer.tokens.shape[1]
    count = keep_count(tokens, pruning_rate)
    if count == tokens:
        raise ValueError(
            f"no token of {layer.block} is dropped at a pruning_rate of {pruning_rate}; give {1 / tokens:.4g} or more, "
            f"or a size at which it has more than {tokens} tokens"
        )
    return count


#: Told of every block in every call of the U-Net.
OnLayer: TypeAlias = Callable[[FirstLayer], None]


def dense_blocks(pipe: Any) -> dict[str, tuple[BlockPlace, Any]]:
    """Return the attention blocks of the U-Net of ``pipe``, by name.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled.
    """
    unet = find_unet(pipe)
    if is_applied(unet) or unet is not pipe.unet:
        raise ValueError("this U-Net is patched or compiled, and rankings are looked at dense; use it as it was before")
    return find_blocks(unet)


def draw_watched(
    pipe: Any,
    blocks: Mapping[str, tuple[BlockPlace, Any]],
    prompts: Sequence[str],
    on_layer: OnLayer,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
    output_type: str,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Any]]:
    """Draw dense, a batch at a time, and look into every block on the way.

    Args:
        pipe: A text-to-image pipeline.
        blocks: From `dense_blocks`.
        prompts: What to draw; image i has the noise of seed ``seed + i``.
        on_layer: Told of every block in every call of the U-Net.
        steps: Denoising steps, each one call of the U-Net.
        guidance: Guidance scale.
        seed: Of the first image.
        batch: Images drawn at once.
        output_type: As pipelines take it.
        progress: Told of every step of every batch.

    Returns:
        An iterator over the batches: the number of the first image, and the images.
    """
    modules = {name: module for name, (_, module) in blocks.items()}
    for start in range(0, len(prompts), batch):
        group = list(prompts[start : start + batch])

        def end_call(_: Any, call: int, __: Any, kwargs: dict[str, Any], start: int = start) -> dict[str, Any]:
            if progress is not None:
                progress(f"images from {start}", call + 1, steps)
            return kwargs

        with watched(modules, len(group), on_layer):
            images = pipe(
                group,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(group))],
                output_type=output_type,
                callback_on_step_end=end_call,
            ).images
        yield start, images


@contextmanager
def watched(blocks: Mapping[str, Any], images: int, on_layer: OnLayer) -> Iterator[None]:
    """Call ``on_layer`` for every block in every call of the U-Net, for the length of a ``with`` block.

    Args:
        blocks: Attention blocks by name, in the order in which they run.
        images: How many are drawn at once; with guidance the batch is twice that, and the second half is looked at.
        on_layer: Told of every block.
    """
    sizes: dict[str, tuple[int, int]] = {}
    self_attention: dict[str, QueriesAndKeys] = {}
    cross_attention: dict[str, QueriesAndKeys] = {}
    calls = 0

    def size(block: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
        sizes[block] = (int(height), int(width))
        calls += block == next(iter(blocks))

    @torch.no_grad()
    def compared(into: dict[str, QueriesAndKeys], block: str, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs["hidden_states"]
        words = kwargs.get("encoder_hidden_states")
        # What attention is handed has been through its norm already.
        q, k, scale = queries_and_keys(module, nn.Identity(), tokens, words)
        into[block] = QueriesAndKeys(q[-images:].float(), k[-images:].float(), scale)

    @torch.no_grad()
    def tell(block: str, _: nn.Module, __: Any, output: Tensor) -> None:
        tokens = output[-images:].float()
        on_layer(FirstLayer(block, calls - 1, tokens, self_attention[block], cross_attention[block], sizes[block]))

    with ExitStack() as hooks:
        for name, block in blocks.items():
            layer = block.transformer_blocks[0]
            for module, hook in (
                (block, partial(size, name)),
                (layer.attn1, partial(compared, self_attention, name)),
                (layer.attn2, partial(compared, cross_attention, name)),
            ):
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(partial(tell, name)).remove)
        yield
