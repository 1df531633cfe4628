"""Look into the first layer of every attention block while a pipeline draws dense. The images are left as they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from atedm.hosts.attention import queries_and_keys
from atedm.hosts.unet_spans import UnetSpans, find_spans, find_unet
from atedm.lab.evaluation.images import Drawing
from atedm.lab.progress import Progress, silent
from atedm.method.contract import QueriesAndKeys, View
from atedm.method.keep import keep_count
from atedm.patch import is_applied

T = TypeVar("T")


def dense_spans(pipe: Any) -> UnetSpans:
    """Return the attention blocks of the U-Net of a pipeline.

    Raises a `TypeError` if it has no U-Net, and a `ValueError` if that is patched or compiled, or has no such blocks.
    """
    unet = find_unet(pipe)
    if is_applied(unet) or unet is not pipe.unet:
        raise ValueError(
            "this U-Net is patched or compiled, and this is measured in dense runs; call atedm.remove(...), or use "
            "the model as it was before torch.compile"
        )
    spans = find_spans(unet)
    if not spans:
        raise ValueError("this U-Net has no attention blocks (Transformer2DModel), so there is nothing to measure")
    return spans


def draw_dense(
    pipe: Any,
    prompts: Sequence[str],
    drawing: Drawing,
    watch: Callable[[int], AbstractContextManager[object]],
    *,
    output_type: str = "latent",
    progress: Progress = silent,
) -> Iterator[Any]:
    """Draw prompts, and yield the images of each batch.

    Image i has the noise of seed ``drawing.seed + i``. ``watch`` is given the number of images of a batch, and gives
    what surrounds the drawing of it. ``output_type`` is as pipelines take it. Raises a `ValueError` if there is nothing
    to draw.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("there are no prompts to draw, or a prompt is empty")
    batches = -(-len(prompts) // drawing.batch)
    for batch, start in enumerate(range(0, len(prompts), drawing.batch)):
        group = list(prompts[start : start + drawing.batch])

        def end_call(_: Any, call: int, __: Any, kwargs: dict[str, Any], batch: int = batch) -> dict[str, Any]:
            calls = len(pipe.scheduler.timesteps)
            progress("images", batch * calls + call + 1, batches * calls)
            return kwargs

        with watch(len(group)):
            drawn = pipe(
                group,
                num_inference_steps=drawing.steps,
                generator=drawing.noise(range(start, start + len(group))),
                output_type=output_type,
                callback_on_step_end=end_call,
                **drawing.call,
            )
        yield drawn.images


def look_into_dense(
    pipe: Any,
    prompts: Sequence[str],
    drawing: Drawing,
    look: Callable[[View], T],
    rate: float | None,
    *,
    both_halves: bool = False,
    output_type: str = "latent",
    progress: Progress = silent,
) -> Iterator[tuple[Any, list[T]]]:
    """Draw prompts as `draw_dense`, and yield of each batch the images and what ``look`` made of every view.

    Views are as in `first_layers_watched`; with guidance they are of the half that knows the prompt, or of both. Raises
    as `dense_spans`, `draw_dense` and `first_layers_watched`.
    """
    spans = dense_spans(pipe)
    found: list[T] = []

    def watch(images: int) -> AbstractContextManager[None]:
        return first_layers_watched(spans, lambda view: found.append(look(view)), rate, None if both_halves else images)

    for images in draw_dense(pipe, prompts, drawing, watch, output_type=output_type, progress=progress):
        yield images, found.copy()
        found.clear()


@contextmanager
def first_layers_watched(
    spans: UnetSpans, on_view: Callable[[View], None], rate: float | None, images: int | None = None
) -> Iterator[None]:
    """Call ``on_view`` for every block in every call of the U-Net, for the length of a ``with`` block.

    The view is what a method would be shown after the first layer, in float32; ``view.step`` counts calls, and
    ``view.count`` is for ``rate``, or all tokens. Only the last ``images`` of the batch are looked at, all by default:
    with guidance, these are the half that knows the prompt. The call raises a `ValueError` if the first layer of a
    block attends to the words in place of its own tokens, or no token is dropped at the rate.
    """
    part = slice(None) if images is None else slice(-images, None)
    sizes: dict[str, tuple[int, int]] = {}
    attention: dict[tuple[str, str], Callable[[], QueriesAndKeys]] = {}
    calls = -1

    def begin_block(block: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
        sizes[block] = (int(height), int(width))
        calls += block == next(iter(spans))

    def begin_attention(block: str, kind: str, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens, words = args[0] if args else kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        if kind == "self" and words is not None:
            raise ValueError(f"the first layer of {block} has no self-attention, so there is no map to measure")

        def compute() -> QueriesAndKeys:
            # What attention is handed has been through its norm already.
            q, k, scale = queries_and_keys(module, nn.Identity(), tokens, words)
            return QueriesAndKeys(q[part].float(), k[part].float(), scale)

        attention[block, kind] = compute

    @torch.no_grad()
    def end_layer(block: str, _: nn.Module, __: Any, output: Tensor) -> None:
        tokens = output[part].float()
        number = tokens.shape[1]
        count = number if rate is None else keep_count(number, rate)
        if rate is not None and count == number:
            raise ValueError(
                f"no token of {block} is dropped at a rate of {rate}; give {1 / number:.4g} or more, or a size at "
                f"which it has more than {number} tokens"
            )
        attentions = (attention[block, "self"], attention[block, "cross"])
        on_view(View(spans[block][0], sizes[block], count, calls, tokens, *attentions))

    with ExitStack() as hooks:
        for name, (_, block) in spans.items():
            layer: Any = block.transformer_blocks[0]
            for module, hook in (
                (block, partial(begin_block, name)),
                (layer.attn1, partial(begin_attention, name, "self")),
                (layer.attn2, partial(begin_attention, name, "cross")),
            ):
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(partial(end_layer, name)).remove)
        yield
