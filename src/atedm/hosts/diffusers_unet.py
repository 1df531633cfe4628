"""The host for diffusers U-Nets: SD 1.x, SD 2.x, SDXL and their ControlNets.

A span is an attention block, a `Transformer2DModel`. A pruned block is the same object with its class swapped for
`PrunedTransformer2DModel`. Weights, hooks, adapters, processors and names stay as they are, the layers themselves run
diffusers' own code, and swapping the class back restores everything.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from atedm.hosts.attention import attention_bias, bias_for, foreign_code, queries_and_keys, stateful_hook
from atedm.hosts.protected import check_room
from atedm.hosts.runs import Run
from atedm.hosts.state import PATCHING, ModelState, is_attached, refuse_attached
from atedm.hosts.unet_spans import choose_spans, find_spans, refuse_at_call, refuse_drift, refuse_unknown
from atedm.method.contract import Memory, Method, Place, View
from atedm.method.protection import protected_tokens


@dataclass
class UnetState(ModelState):
    """What the spans of one pruned U-Net share."""

    run: Run = field(default_factory=Run)


@dataclass
class SpanState:
    """What one pruned span knows."""

    place: Place
    model: UnetState
    memory: Memory = field(default_factory=Memory)
    #: Whether the span is left dense in this call, because something in it reads tokens by their place.
    is_dense: bool = False

    def count(self, tokens: int) -> int:
        """Tokens that go on in this step."""
        return tokens if self.is_dense else self.model.method.count(self.place, tokens, early=self.model.early)


class LayerInputs(NamedTuple):
    """What every layer of a block is handed besides the tokens."""

    encoder_hidden_states: Any
    encoder_attention_mask: Tensor | None
    timestep: Any
    cross_attention_kwargs: dict[str, Any] | None
    class_labels: Any


class PrunedTransformer2DModel(Transformer2DModel):  # type: ignore[misc]
    """A `Transformer2DModel` of which some layers run on the kept tokens only."""

    _atedm: SpanState

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run the block as diffusers does, dropping tokens where the method says and refilling them at the end."""
        batch, _, height, width = hidden_states.shape
        # Hooks that were laid over this method (of an offload, say) go on calling it when the patch is gone.
        span: SpanState | None = vars(self).get("_atedm")
        if span is None or span.count(height * width) == height * width:
            return Transformer2DModel.forward(
                self,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                timestep=timestep,
                added_cond_kwargs=added_cond_kwargs,
                class_labels=class_labels,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=return_dict,
            )
        if encoder_attention_mask is not None and encoder_attention_mask.ndim == 2:
            encoder_attention_mask = (1 - encoder_attention_mask.to(hidden_states.dtype)) * -10000.0
            encoder_attention_mask = encoder_attention_mask.unsqueeze(1)
        inputs = LayerInputs(
            encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs, class_labels
        )
        tokens, inner_dim = self._operate_on_continuous_inputs(hidden_states)
        output = self._get_output_for_continuous_inputs(
            hidden_states=self._layers(tokens, (height, width), inputs),
            residual=hidden_states,
            batch_size=batch,
            height=height,
            width=width,
            inner_dim=inner_dim,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _layers(self, tokens: Tensor, size: tuple[int, int], inputs: LayerInputs) -> Tensor:
        """Run all layers over (B, N, C) tokens and give (B, N, C) back."""
        span, method = self._atedm, self._atedm.model.method
        start = tokens
        for layer in self.transformer_blocks[: method.dense_layers]:
            tokens = self._layer(layer, tokens, inputs)
        cut = method.drop(self._view(tokens, start, size, inputs))
        span.model.observe(span.place.name, method.dense_layers, cut, size)
        tokens = cut.tokens
        bias = attention_bias(cut.weights, tokens)
        for layer in self.transformer_blocks[method.dense_layers :]:
            tokens = self._layer(layer, tokens, inputs, bias)
        return cut.refill(tokens)

    def _view(self, tokens: Tensor, start: Tensor, size: tuple[int, int], inputs: LayerInputs) -> View:
        """Describe a span whose ``start`` (B, N, C) has become ``tokens`` (B, N, C) after the dense layers."""
        span, layer = self._atedm, self.transformer_blocks[0]
        protect = span.model.protect
        words = (inputs.encoder_hidden_states, inputs.encoder_attention_mask)
        return View(
            place=span.place,
            size=size,
            count=span.count(tokens.shape[1]),
            step=span.model.step,
            tokens=tokens,
            self_attention=partial(queries_and_keys, layer.attn1, layer.norm1, start),
            cross_attention=partial(queries_and_keys, layer.attn2, layer.norm2, tokens, *words),
            protected=None if protect is None else protected_tokens(protect, size).to(tokens.device),
            memory=span.memory,
        )

    def _layer(
        self, layer: BasicTransformerBlock, tokens: Tensor, inputs: LayerInputs, bias: Tensor | None = None
    ) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(  # type: ignore[no-any-return]
                layer, tokens, bias_for(layer.attn1, bias), *inputs
            )
        return layer(tokens, attention_mask=bias_for(layer.attn1, bias), **inputs._asdict())  # type: ignore[no-any-return]


#: The class of a pruned block by the type of method; `atedm.lab.ablation` adds one that prunes inside its layers.
BLOCK_CLASSES: dict[type, type[PrunedTransformer2DModel]] = {}


def attach(unet: UNet2DConditionModel, method: Method, protect: Tensor | None = None) -> None:
    """Let ``method`` prune a U-Net.

    Args:
        unet: Not pruned yet.
        method: What prunes.
        protect: (H, W) zeros and ones over the image: what is never dropped.

    Raises:
        TypeError: If diffusers has changed what this host takes over, or a block is of an unknown class.
        ValueError: If it is pruned already, there is nothing to prune, or a block cannot be pruned as it is. Nothing
            has been changed then.
    """
    refuse_attached(unet)
    refuse_drift()
    chosen = choose_spans(find_spans(unet), method)
    block_class = BLOCK_CLASSES.get(type(method), PrunedTransformer2DModel)
    for name, (_, module) in chosen.items():
        refuse_unknown(name, module)
        if check := getattr(block_class, "check", None):
            check(name, module, method)
    state = UnetState(method, tuple(chosen), protect=protect)
    with PATCHING:
        refuse_attached(unet)  # another thread may have been quicker
        for place, module in chosen.values():
            module._atedm = SpanState(place, state)
            module.__class__ = block_class
        unet._atedm = state
        unet._atedm_hooks = (
            unet.register_forward_pre_hook(before_forward, with_kwargs=True),
            unet.register_forward_hook(after_forward, always_call=True),
        )


def detach(unet: UNet2DConditionModel) -> None:
    """Undo `attach`: the U-Net is exactly as before. Call it with `PATCHING` held."""
    for module in unet.modules():
        if isinstance(module, PrunedTransformer2DModel):
            module.__class__ = Transformer2DModel
            del module._atedm
    for hook in unet._atedm_hooks:
        hook.remove()
    del unet._atedm_hooks, unet._atedm


# Hooks are plain functions that find their state on the module they are called with, so that copies of a patched U-Net,
# pickled or not, use their own. `torch.compile` must leave them alone, or it would compile them again at every step.


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_forward(unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the spans where the step stands, and refuse what cannot be honoured. A forward pre-hook of the U-Net."""
    names = [*inspect.signature(type(unet).forward).parameters][1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    if "timestep" not in given:
        return  # the call fails at once, and diffusers says why
    if given.get("attention_mask") is not None:
        raise ValueError("attention_mask masks tokens by their place, which pruning changes; call atedm.remove first")
    if (given.get("cross_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
        raise ValueError(
            "ip_adapter_masks are laid over the tokens by their number, which pruning changes; "
            "call atedm.remove first, or leave the masks out"
        )
    state: UnetState = unet._atedm
    with PATCHING:
        state.caller.begin()
    if state.fixed is None:
        position, follows = state.run.locate(given["timestep"])
        state.early, state.step = state.method.is_early(position.share), torch.tensor(position.step, device="cpu")
    else:
        (state.early, state.step), follows = state.fixed, True
    for name in state.spans:
        block = unet.get_submodule(name)
        refuse_at_call(name, block)
        block._atedm.memory.begin_step(follows=follows)
        why = _why_dense(block.transformer_blocks[state.method.dense_layers :])
        block._atedm.is_dense = why is not None
        if why is not None:
            _say_once(name, why)
    sample = given.get("sample")
    if state.protect is not None and isinstance(sample, Tensor):
        state.protect = state.protect.to(sample.device)
        check_protected_unet(unet, (sample.shape[-2], sample.shape[-1]))


def _parts(layers: Iterable[Any]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of layers that others are known to change; few of many, because each step looks at them."""
    for layer in layers:
        yield "a layer", layer
        yield "attn1", layer.attn1
        yield "attn2", layer.attn2


def _why_dense(layers: Iterable[Any]) -> str | None:
    """Say what in some layers may read tokens by their place; None if nothing does."""
    parts = [*_parts(layers)]
    if (foreign := foreign_code(parts)) is not None:
        return (
            f"{foreign} is not diffusers' own and may read tokens by their place. An attention processor that does not "
            "can be added to atedm.hosts.attention.TRUSTED_PROCESSORS"
        )
    for name, module in parts:
        if (cache := stateful_hook(module)) is not None:
            return f"{cache} keeps what {name} gave for other tokens"
    return None


@functools.cache
def _say_once(span: str, why: str) -> None:
    logging.getLogger("atedm").warning("%s is left dense: %s.", span, why)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def after_forward(unet: UNet2DConditionModel, *_: Any) -> None:
    """Let other threads call the U-Net. A forward hook that is called after an exception as well."""
    if is_attached(unet):
        unet._atedm.caller.end()


def check_protected_unet(unet: Any, size: tuple[int, int]) -> None:
    """See before any work that no span will keep fewer tokens than are protected.

    Args:
        unet: Patched.
        size: (height, width) of the latents.

    Raises:
        ValueError: If one will; the message names a rate that leaves enough.
    """
    state: UnetState = unet._atedm
    if state.protect is None or size in state.with_room:
        return
    grids = {}
    for name in state.spans:
        place = unet.get_submodule(name)._atedm.place
        height, width = (-(-side // 2 ** (place.level - 1)) for side in size)
        grids[place] = (height, width)
    check_room(state.method, grids, state.protect)
    state.with_room.add(size)
