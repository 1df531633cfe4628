"""Spans of the transformers in ComfyUI: runs of blocks of FLUX, SD3 and Qwen-Image.

The tokens of the image are dropped before the first block of a span and refilled after its last; those of the prompt
all stay. Each kept token keeps its place: its rotary embedding is gathered with it. The first block of a model
always runs on all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, compiler

from atedm.hosts.comfyui_call import Call
from atedm.method.contract import Cut, Memory, Method, Place, View
from atedm.method.keep import gather_tokens

#: Where the blocks are, by what ComfyUI calls the class of a transformer.
_BLOCKS = {
    "Flux": ("double_blocks", "single_blocks"),
    "OpenAISignatureMMDITWrapper": ("joint_blocks",),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
}
#: What ComfyUI calls blocks that hold prompt and image apart, and those that hold them as one; and, by the same names,
#: patches that run between blocks.
_KINDS = ("double_block", "single_block")
_OVERRIDE = "optimized_attention_override"


def is_transformer(network: Any) -> bool:
    """Whether it is one of those known here."""
    return type(network).__name__ in _BLOCKS


def find_spans(network: Any) -> Iterator[TransformerSpan]:
    """Yield the spans of a transformer: one for each of its kinds of block."""
    names = _BLOCKS[type(network).__name__]
    for index, name in enumerate(names):
        blocks = len(getattr(network, name))
        chosen = range(int(index == 0), blocks)
        if chosen:
            path = f"{name}.{chosen[0]}-{chosen[-1]}"
            place = Place("mid", 1, index, len(names), len(chosen), path)
            yield TransformerSpan(place, _KINDS[index], chosen, int(network.patch_size))


@dataclass
class Active:
    """A span in the middle of a call that prunes it."""

    call: Call
    memory: Memory
    size: tuple[int, int]
    cut: Cut
    #: T, how many tokens the prompt has.
    words: int
    #: (B, 1, T + K), added to the logits of attention; None where nothing is added.
    bias: Tensor | None
    #: The rotary embedding of what is left, once it was gathered.
    rotary: Tensor | None = None
    #: Whether attention was handed the bias.
    is_weighted: bool = False


@dataclass
class TransformerSpan:
    """A run of blocks of one kind."""

    place: Place
    kind: str
    blocks: range
    patch_size: int
    call: Call | None = None
    active: Active | None = None
    #: Image tokens (B, N, C) before the first block, in a step that drops none and is to be remembered.
    before: Tensor | None = None
    #: Whether it runs on all tokens in this call.
    is_dense: bool = False
    #: What was laid on, by ComfyUI's key of a block.
    laid: dict[tuple[str, int], Callable[..., Any]] = field(default_factory=dict)
    #: Whether another node had laid something on one of the blocks before.
    is_shared: bool = False

    def lay_on(self, model: Any) -> None:
        """Lay a patch on every block of a clone."""
        table = model.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
        for index in self.blocks:
            before = table.get((self.kind, index))
            self.is_shared |= before is not None
            self.laid[self.kind, index] = _block(self, index, before)
            model.set_model_patch_replace(self.laid[self.kind, index], "dit", self.kind, index)

    def begin_call(self, call: Call, options: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
        """Prune in this call, unless something reads tokens by their place."""
        self.call, self.active, self.before, self.is_dense = call, None, None, False
        reason = self._why_dense(options, control)
        if reason is not None:
            self._leave_dense(reason)

    def end_call(self) -> None:
        """Forget the call."""
        self.call = self.active = self.before = None

    def _leave_dense(self, reason: str) -> None:
        assert self.call is not None
        self.call.say(f"{self.place.name} is left dense, because {reason}")
        self.is_dense = True

    def _why_dense(self, options: Mapping[str, Any], control: Mapping[str, Any] | None) -> str | None:
        if control is not None and any(added is not None for of_part in control.values() for added in of_part):
            return "a ControlNet adds to its tokens between blocks"
        for name in _KINDS:
            if options.get("patches", {}).get(name):
                return f"another node patches its tokens between blocks ({name})"
        table = options.get("patches_replace", {}).get("dit", {})
        if self.is_shared or any(table.get(key) is not patch for key, patch in self.laid.items()):
            return "another node replaces some of its blocks"
        return None

    # Methods and their state are left out of `torch.compile`, which would compile them again at every step.

    @compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, args: dict[str, Any]) -> dict[str, Any]:
        """Drop tokens before the first block: give what the block is handed in place of ``args``."""
        self.active = self.before = None
        if self.call is None:
            return args
        call, image = self.call, args["img"]
        if self.kind == _KINDS[0]:
            call.words = args["txt"].shape[1]
        if self.is_dense:
            return args
        words = call.words if self.kind == _KINDS[1] else 0
        if words is None:
            self._leave_dense("how many of its tokens are the prompt's is not known")
            return args
        prompt, tokens = image[:, :words], image[:, words:]
        number = tokens.shape[1]
        count = call.count(self.place, number)
        if count >= number:
            self.before = tokens.clone() if _remembers_dense(call.pruning.method) else None  # blocks may add in place
            return args
        height, width = (-(-side // self.patch_size) for side in call.latents)
        if height * width != number:
            self._leave_dense(f"its {number} tokens are not those of one image, {height * width}")
            return args
        if args.get("attn_mask") is not None:
            self._leave_dense("attention is masked")
            return args
        memory = call.memory(self.place)
        cut = call.pruning.method.drop(
            View(
                place=self.place,
                size=(height, width),
                count=count,
                step=call.run.step,
                tokens=tokens,
                self_attention=_no_attention,
                cross_attention=_no_attention,
                memory=memory,
            )
        )
        bias = None
        if cut.weights is not None:
            # A token that stands for n tokens is attended to n times (Bolya et al., Token Merging, 2023).
            bias = torch.nn.functional.pad(cut.weights.log(), (call.words or 0, 0)).to(tokens.dtype).unsqueeze(1)
        self.active = Active(call, memory, (height, width), cut, call.words or 0, bias)
        # Blocks may add to their input in place, and the method reads what it gave later.
        return args | {"img": torch.cat([prompt, cut.tokens], 1) if words else cut.tokens.clone()}

    @compiler.disable  # type: ignore[untyped-decorator]
    def hand(self, active: Active, args: dict[str, Any]) -> dict[str, Any]:
        """Give what a block is handed in place of ``args``, besides the tokens."""
        more: dict[str, Any] = {}
        if (rotary := args.get("pe")) is not None:
            if active.rotary is None:
                active.rotary = gather_places(rotary, active.cut.keep, active.words)
            more["pe"] = active.rotary
        if active.bias is not None and "attn_mask" in args:
            more["attn_mask"], active.is_weighted = active.bias.unsqueeze(1), True
        elif active.bias is not None and (options := args.get("transformer_options")) is not None:
            more["transformer_options"] = options | {_OVERRIDE: _weighted(active, options.get(_OVERRIDE))}
        return args | more

    @compiler.disable  # type: ignore[untyped-decorator]
    def remember(self, before: Tensor, out: dict[str, Any]) -> None:
        """Let the method remember what a step that dropped nothing did to each token."""
        assert self.call is not None
        words = (self.call.words or 0) if self.kind == _KINDS[1] else 0
        memory, method = self.call.memory(self.place), self.call.pruning.method
        method.remember_dense(before, out["img"][:, words:], memory)  # type: ignore[attr-defined]
        self.call.run.remember(self.place.name, memory)
        self.before = None

    @compiler.disable  # type: ignore[untyped-decorator]
    def refill(self, active: Active, out: dict[str, Any]) -> dict[str, Any]:
        """Give all tokens after the last block."""
        words = active.words if self.kind == _KINDS[1] else 0
        image = out["img"]
        filled = active.cut.refill(image[:, words:])
        if active.bias is not None and not active.is_weighted:
            active.call.say("this ComfyUI is older than 0.3.59 and cannot weight tokens, so that images are less exact")
        active.call.finish(self.place, active.memory, active.size, active.cut.keep)
        self.active = None
        return out | {"img": torch.cat([image[:, :words], filled], 1) if words else filled}


def _block(span: TransformerSpan, index: int, before: Callable[..., Any] | None) -> Callable[..., Any]:
    """Patch of a block; ``before`` is what another node had laid on it."""

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if index == span.blocks[0]:
            args = span.begin(args)
        active = span.active
        if active is not None:
            args = span.hand(active, args)
        out: dict[str, Any] = extra["original_block"](args) if before is None else before(args, extra)
        if active is not None and index == span.blocks[-1]:
            out = span.refill(active, out)
        elif span.before is not None and index == span.blocks[-1]:
            span.remember(span.before, out)
        return out

    return compiler.disable(patch, recursive=False)  # type: ignore[no-untyped-call,no-any-return]


def _weighted(active: Active, before: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """Attention that adds the bias of the kept tokens; ``before`` is what another node had put in its place."""

    def attention(
        function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **kwargs: Any
    ) -> Tensor:
        bias = active.bias
        assert bias is not None
        tokens = k.shape[2] if kwargs.get("skip_reshape") else k.shape[1]
        if tokens == bias.shape[2] - active.words:  # some blocks attend within the image, too
            bias = bias[:, :, active.words :]
        if mask is None and tokens == bias.shape[2]:
            mask, active.is_weighted = bias.to(q.dtype), True
        if before is not None:
            return before(function, q, k, v, heads, mask=mask, **kwargs)
        return function(q, k, v, heads, mask=mask, **kwargs)

    return attention


def gather_places(rotary: Tensor, keep: Tensor, words: int) -> Tensor:
    """Gather a rotary embedding of T + N tokens, prompt first, for the T + K that are left.

    Args:
        rotary: (B or 1, T + N, 1, ...) as Qwen-Image has it, or (B or 1, 1, T + N, ...) as FLUX.
        keep: (B, K) int64 into N.
        words: T.

    Returns:
        The same with (B, T + K).
    """
    dim = 2 if rotary.shape[1] == 1 else 1
    prompt = torch.arange(words, device=keep.device).expand(len(keep), -1)
    index = torch.cat([prompt, keep + words], 1)
    rows = rotary.movedim(dim, 1)
    return gather_tokens(rows.expand(len(keep), *rows.shape[1:]), index).movedim(1, dim)


def _remembers_dense(method: Method) -> bool:
    return method.remembers and hasattr(method, "remember_dense")


def _no_attention() -> NoReturn:
    raise ValueError("attention of these transformers is not read; the method 'matched' works here")
