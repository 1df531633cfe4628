"""Spans of ComfyUI's U-Nets: the attention blocks (`SpatialTransformer`) of SD 1.5, SD 2 and SDXL.

The first layer of a block that runs on fewer tokens drops the others before it runs, and the last one refills them
after it ran. Between them ComfyUI's own code runs. Self-attention is handed how many tokens each kept one stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, compiler, float32, nn

from atedm.hosts.comfyui_call import Call
from atedm.method.contract import Cut, Memory, Place, QueriesAndKeys, View

_BLOCK = "SpatialTransformer"
#: Patches that may read the tokens of an attention block by their place.
_PATCHES = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")


def is_unet(network: Any) -> bool:
    """Whether it is laid out as ComfyUI's U-Nets are."""
    return all(hasattr(network, name) for name in ("input_blocks", "middle_block", "output_blocks", "num_res_blocks"))


def find_spans(unet: Any, dense_layers: int) -> Iterator[UnetSpan]:
    """Yield every attention block that can be pruned, in the order they run.

    Raises:
        ValueError: If the blocks are not laid out in levels as ``num_res_blocks`` says.
    """
    levels = len(unet.num_res_blocks)
    # A convolution, then so many blocks a level, and one that halves the grid between levels.
    down = [1] + [
        level for level, blocks in enumerate(unet.num_res_blocks, 1) for _ in range(blocks + (level < levels))
    ]
    up = [level for level, blocks in reversed([*enumerate(unet.num_res_blocks, 1)]) for _ in range(blocks + 1)]
    if len(down) != len(unet.input_blocks) or len(up) != len(unet.output_blocks):
        raise ValueError(
            f"this U-Net has {len(unet.input_blocks)} input and {len(unet.output_blocks)} output blocks, where "
            f"{len(down)} and {len(up)} were expected; it is of a kind not known here"
        )
    middle = [unet.middle_block] if unet.middle_block is not None else []
    parts = (
        ("down", "input", [*zip(down, unet.input_blocks, strict=True)]),
        ("mid", "middle", [(levels, block) for block in middle]),
        ("up", "output", [*zip(up, unet.output_blocks, strict=True)]),
    )
    for stage, name, blocks in parts:
        found = [
            (level, number, f"{name}_block{'' if stage == 'mid' else f's.{number}'}.{child}", module)
            for number, (level, block) in enumerate(blocks)
            for child, module in block.named_children()
            if _is_known(module)
        ]
        of_level: dict[int, int] = {}
        for level, number, path, module in found:
            index = of_level.get(level, 0)
            of_level[level] = index + 1
            count = sum(other[0] == level for other in found)
            place = Place(stage, level, index, count, len(module.transformer_blocks), path)
            yield UnetSpan(place, (name, number), module, dense_layers)


def _is_known(module: Any) -> bool:
    """Whether it is an attention block over one image with layers, each with self- and cross-attention."""
    if type(module).__name__ != _BLOCK or not len(module.transformer_blocks):  # some small models have empty ones
        return False
    return all(
        getattr(layer, "attn2", None) is not None and not getattr(layer, "disable_self_attn", False)
        for layer in module.transformer_blocks
    )


@dataclass
class Active:
    """A block in the middle of a call that prunes it."""

    call: Call
    size: tuple[int, int]
    count: int
    #: (B, N, C) tokens before the first layer.
    start: Tensor
    memory: Memory
    cut: Cut | None = None


@dataclass
class UnetSpan:
    """An attention block."""

    place: Place
    #: What ComfyUI calls the block that it lies in, such as ("input", 4).
    block: tuple[str, int]
    module: Any
    dense_layers: int
    call: Call | None = None
    active: Active | None = None
    #: What was laid on: the modules and their functions.
    laid: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)

    def lay_on(self, model: Any) -> None:
        """Lay patches on the layers of a clone, over those of other nodes."""
        layers = self.module.transformer_blocks
        for index in sorted({0, self.dense_layers, len(layers) - 1}):
            self._patch(model, f"transformer_blocks.{index}", partial(_layer, self, index))
        for index in range(self.dense_layers, len(layers)):
            self._patch(model, f"transformer_blocks.{index}.attn1", partial(_self_attention, self))

    def _patch(self, model: Any, path: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        full = f"diffusion_model.{self.place.name}.{path}.forward"
        function = make(model.get_model_object(full))
        model.add_object_patch(full, function)
        self.laid.append((self.module.get_submodule(path), function))

    def begin_call(self, call: Call, options: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
        """Prune in this call, unless something in the block may read tokens by their place.

        What a ControlNet adds is added to feature maps between blocks, where all tokens are back.
        """
        reason = self._why_dense(options)
        self.call, self.active = (call, None) if reason is None else (None, None)
        if reason is not None:
            call.say(f"{self.place.name} is left dense, because {reason}")

    def end_call(self) -> None:
        """Forget the call."""
        self.call = self.active = None

    def _why_dense(self, options: Mapping[str, Any]) -> str | None:
        for name in _PATCHES:
            if options.get("patches", {}).get(name):
                return f"another node patches attention ({name}) and may read tokens by their place"
        for name in ("attn1", "attn2"):
            if any(tuple(block[:2]) == self.block for block in options.get("patches_replace", {}).get(name, ())):
                return f"another node replaces its attention ({name})"
        if any(vars(module).get("forward") is not function for module, function in self.laid):
            return "another node has laid its patch over this one; put token pruning after it"
        return None

    # Methods and their state are left out of `torch.compile`, which would compile them again at every step; layers and
    # what they are made of are not.

    @compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, tokens: Tensor, options: Mapping[str, Any]) -> None:
        """Start on the tokens (B, N, C) that the first layer is handed."""
        self.active = None
        if self.call is None:
            return
        number = tokens.shape[1]
        count = self.call.count(self.place, number)
        if count >= number:
            return
        height, width = list(options.get("activations_shape", (0, 0)))[-2:]
        if height * width != number:
            self.call.say(f"{self.place.name} is left dense, because its {number} tokens are not one image's")
            return
        # Layers may add to their input in place, so what is read later must not be what they are handed.
        start = tokens.clone() if self.dense_layers else tokens
        self.active = Active(self.call, (height, width), count, start, self.call.memory(self.place))

    @compiler.disable  # type: ignore[untyped-decorator]
    def drop(self, active: Active, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Drop some of the tokens (B, N, C) and give what the layers go on with, (B, K, C)."""
        layer = self.module.transformer_blocks[0]
        active.cut = active.call.pruning.method.drop(
            View(
                place=self.place,
                size=active.size,
                count=active.count,
                step=active.call.run.step,
                tokens=tokens,
                self_attention=partial(queries_and_keys, layer.attn1, layer.norm1, active.start),
                cross_attention=partial(queries_and_keys, layer.attn2, layer.norm2, tokens, context),
                memory=active.memory,
            )
        )
        return active.cut.tokens.clone()

    @compiler.disable  # type: ignore[untyped-decorator]
    def refill(self, active: Active, tokens: Tensor) -> Tensor:
        """Give all tokens (B, N, C) from the kept ones (B, K, C) after the last layer."""
        assert active.cut is not None
        filled = active.cut.refill(tokens)
        active.call.finish(self.place, active.memory, active.size, active.cut.keep)
        self.active = None
        return filled

    def bias(self, tokens: Tensor) -> Tensor | None:
        """What self-attention over ``tokens`` (B, K, C) adds to its logits, (B, 1, K); None where nothing is added.

        A token that stands for n tokens is attended to n times: log n is added (Bolya et al., Token Merging, 2023).
        """
        cut = None if self.active is None else self.active.cut
        if cut is None or cut.weights is None:
            return None
        return cut.weights.log().to(tokens.dtype).unsqueeze(1)


def _layer(span: UnetSpan, index: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Patch of a layer's ``forward``."""

    def forward(x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if index == 0:
            options = kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict)), {})
            span.begin(x, options)
        active = span.active
        if active is not None and index == span.dense_layers:
            x = span.drop(active, x, context)
        x = original(x, context, *args, **kwargs)
        if active is not None and index == span.place.layers - 1:
            x = span.refill(active, x)
        return x

    return compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call,no-any-return]


def _self_attention(span: UnetSpan, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Patch of the ``forward`` of a layer's self-attention."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = span.bias(x)
        return original(x, *args, **kwargs) if bias is None else original(x, *args, **kwargs | {"mask": bias})

    return forward


def queries_and_keys(attention: Any, norm: nn.Module, tokens: Tensor, context: Tensor | None = None) -> QueriesAndKeys:
    """Project (B, N, C) tokens as a `CrossAttention` does; keys come from ``context`` where it is given.

    The projections are called, not read, so that LoRA and weights that are cast or moved on the fly take part.
    """
    normed = norm(tokens)
    q = attention.to_q(normed)
    k = attention.to_k(normed if context is None else context)
    q, k = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k))
    if getattr(attention, "attn_precision", None) == float32:  # their product leaves the range of float16
        q, k = q.float(), k.float()
    return QueriesAndKeys(q, k, q.shape[-1] ** -0.5)
