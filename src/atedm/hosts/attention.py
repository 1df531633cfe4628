"""What a host reads from diffusers' attention layers, and what it hands them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor, cat, finfo, nn
from torch.nn import functional

from atedm.method.contract import QueriesAndKeys

PERTURBED = {PAGCFGIdentitySelfAttnProcessor2_0: 3, PAGIdentitySelfAttnProcessor2_0: 2}
"""Attention processors of perturbed-attention guidance, and the parts of their batch; the last one is perturbed."""
TRUSTED_PROCESSORS: set[type] = set()
"""Classes of attention processors from outside of diffusers that work on any number of tokens; add your own."""
_OWN = "diffusers.models."
_LAY_HOOKS = ("accelerate", "diffusers", "peft", "torch")
"""Packages whose hooks call what they are laid over, and leave the number of tokens alone."""
_MAKE_LOGITS = (AttnProcessor, SlicedAttnProcessor, CustomDiffusionAttnProcessor)


def foreign_code(parts: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Name the first code in layers that may read tokens by their place; None if there is none.

    diffusers' own layers and attention processors work on any number of tokens. Others may store attention maps, lay
    masks over the image, append the keys of another image, or keep an output for the next step, as self-attention
    guidance, Attend-and-Excite, prompt-to-prompt, DAAM, regional prompting, reference-only generation, cross-frame
    attention and T-GATE do. They come as attention processors, which are not trusted unless their class is in
    `TRUSTED_PROCESSORS`, or as a ``forward`` laid over that of a layer or of its attention. Hooks of accelerate,
    diffusers, peft and torch are laid over it too; what they call in turn is looked at.

    Args:
        parts: Names and modules of layers and of their attentions.
    """
    for name, module in parts:
        if (function := _foreign_forward(module)) is not None:
            return f"the forward of {name} is {function}, which"
        processor = vars(module).get("processor")
        kind = type(processor)
        if processor is not None and not kind.__module__.startswith(_OWN) and kind not in TRUSTED_PROCESSORS:
            return f"its attention processor {kind.__qualname__}"
    return None


def stateful_hook(module: nn.Module) -> str | None:
    """Name a hook of diffusers on a module that lasts from one call to the next, as those of its caches do."""
    registry = getattr(module, "_diffusers_hook", None)
    for name, hook in (getattr(registry, "hooks", None) or {}).items():
        if getattr(hook, "_is_stateful", False):
            return str(name)
    return None


def _foreign_forward(module: nn.Module) -> str | None:
    """Name a function of nobody known here that was laid over the ``forward`` of a module."""
    function = vars(module).get("forward")
    while function is not None:
        if getattr(function, "__func__", None) is type(module).forward:
            return None
        inner = getattr(function, "func", getattr(function, "__func__", function))  # of a partial, of a bound method
        if getattr(inner, "__module__", "").partition(".")[0] not in _LAY_HOOKS:
            return str(getattr(inner, "__qualname__", inner))
        function = getattr(function, "__wrapped__", None)
    return None


def queries_and_keys(
    attention: Attention,
    norm: nn.Module,
    tokens: Tensor,
    context: Any = None,
    bias: Tensor | None = None,
) -> QueriesAndKeys:
    """Project (B, N, C) tokens as the attention layer does; keys come from ``context`` where it is given.

    The projections are called, not read, so that LoRA adapters and offload hooks take part. A ``bias`` (B, 1, words) on
    the logits, by which padded words are masked, comes in one column more of both. With an IP-Adapter the context is a
    tuple of words and image prompts; only the words count.
    """
    context = context[0] if isinstance(context, tuple) else context
    normed = norm(tokens)
    q = attention.to_q(normed)
    k = attention.to_k(normed if context is None else context)
    q, k = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k))
    if attention.norm_q is not None:
        q = attention.norm_q(q)
    if attention.norm_k is not None:
        k = attention.norm_k(k)
    if attention.upcast_attention:  # their product leaves the range of float16, as in SD 2.1
        q, k = q.float(), k.float()
    if bias is not None:
        q, k = _with_bias(q, k, bias, attention.scale)
    return QueriesAndKeys(q, k, attention.scale)


def _with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Let a bias (B, 1, words) on the logits ride in their product, as one on queries and over the scale on keys."""
    largest = finfo(k.dtype).max
    column = (bias.float() / scale).to(k.dtype).clamp(-largest, largest)
    column = column.unsqueeze(-1).expand(*k.shape[:3], 1)
    return functional.pad(q, (0, 1), value=1.0), cat([k, column], dim=-1)


def attention_bias(weights: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Turn the ``weights`` (B, N) of tokens into what self-attention adds to its logits, (B, 1, N).

    A token that stands for n tokens is attended to n times: log n is added to its logits (Bolya et al., Token Merging,
    ICLR 2023).
    """
    return None if weights is None else weights.log().to(tokens.dtype).unsqueeze(1)


def bias_for(attention: Attention, bias: Tensor | None) -> Tensor | None:
    """Return as much of a bias on self-attention (B, 1, N) as the processor of an attention layer asks for.

    Under perturbed-attention guidance the last part of the batch attends to itself alone, and the processor takes the
    bias of the others. Processors that make the logits themselves add it to them in float32 where the layer asks for
    that; fused attention wants it in the dtype of the tokens.
    """
    if bias is None:
        return None
    if attention.upcast_attention and isinstance(attention.processor, _MAKE_LOGITS):
        bias = bias.float()
    parts = PERTURBED.get(type(attention.processor))
    return bias if parts is None else bias[: len(bias) // parts * (parts - 1)]
