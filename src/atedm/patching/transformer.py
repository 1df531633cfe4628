"""The attention block that prunes: diffusers' `Transformer2DModel` with tokens dropped between or inside its layers.

A patched block is the same object with its class swapped for `PrunedTransformer2DModel`. Weights, hooks, adapters,
processors and names stay as they are, the layers themselves run diffusers' own code, and swapping the class back
restores everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as AttentionModule
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from atedm.attention_map import mean_attention_map
from atedm.config import PruningConfig
from atedm.pruning import gather_submap, keep_count
from atedm.schedule import BlockPlace
from atedm.token_pruning import Dropped, drop_tokens
from atedm.token_ranking import QueriesAndKeys, Ranking, rank_tokens


class BlockObservation(NamedTuple):
    """What an observer is told of one pruning layer: see `atedm.observed`."""

    #: Name of the block in the U-Net.
    block: str
    #: Layer in the block, counted from 0.
    layer: int
    #: Index of the denoising step.
    step: int
    #: (B, N) float32, of the tokens that reach the layer: the whole grid, unless an earlier layer dropped some.
    importance: Tensor
    #: (B, K) int64, ascending: places among those N.
    keep: Tensor
    #: (h, w) of the block's grid.
    size: tuple[int, int]


@dataclass
class UNetState:
    """What the blocks of one patched U-Net share. The step is set before each call of the U-Net, so nothing lasts."""

    config: PruningConfig
    #: Names of the patched blocks.
    blocks: tuple[str, ...]
    prune_less: bool = False
    #: Index of the denoising step. A tensor of the host, because `torch.compile` takes an int here for a constant.
    step: Tensor = field(default_factory=partial(torch.tensor, 0, device="cpu"))
    observers: list[Any] = field(default_factory=list)


@dataclass
class BlockPatch:
    """What one patched block knows."""

    place: BlockPlace
    state: UNetState
    #: Whether the block is left alone in prune-less steps.
    spared: bool

    def counts(self, tokens: int) -> dict[int, int]:
        """Tokens left after each pruning layer of this block in this step, by layer; empty for a dense step."""
        counts: dict[int, int] = {}
        if self.spared and self.state.prune_less:
            return counts
        left = tokens
        for layer, rate in self.state.config.rates_in(self.place.layers):
            if keep_count(left, rate) < left:
                left = counts[layer] = keep_count(left, rate)
        return counts


class _Call(NamedTuple):
    """The arguments that every layer of a block is handed."""

    encoder_hidden_states: Any
    encoder_attention_mask: Tensor | None
    timestep: Any
    cross_attention_kwargs: dict[str, Any] | None
    class_labels: Any


class PrunedTransformer2DModel(Transformer2DModel):  # type: ignore[misc]
    """A `Transformer2DModel` of which some layers run on the important tokens only."""

    _atedm: BlockPatch

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
        """Run the block as diffusers does, dropping tokens where the config says and refilling them at the end."""
        batch, _, height, width = hidden_states.shape
        # Hooks that were laid over this method (of an offload, say) go on calling it when the patch is gone.
        patch: BlockPatch | None = vars(self).get("_atedm")
        counts = patch.counts(height * width) if patch is not None else {}
        if not counts:
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
        call = _Call(encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs, class_labels)
        tokens, inner_dim = self._operate_on_continuous_inputs(hidden_states)
        output = self._get_output_for_continuous_inputs(
            hidden_states=self._layers(tokens, counts, (height, width), call),
            residual=hidden_states,
            batch_size=batch,
            height=height,
            width=width,
            inner_dim=inner_dim,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _layers(self, tokens: Tensor, counts: dict[int, int], size: tuple[int, int], call: _Call) -> Tensor:
        """Run all layers over (B, N, C) tokens and give (B, N, C) back."""
        dropped: list[Dropped] = []
        weights: Tensor | None = None
        bias: Tensor | None = None
        first_map = self._first_map(tokens)
        for index, layer in enumerate(self.transformer_blocks):
            if index in counts:
                tokens, record = self._pruning_layer(
                    index, layer, tokens, counts[index], size, call, first_map, weights
                )
                dropped.append(record)
                weights = record.weights
                bias = _attention_bias(weights, tokens)
                if first_map is not None:
                    first_map = gather_submap(first_map, record.keep)
            else:
                tokens = self._layer(layer, tokens, call, bias)
        for record in reversed(dropped):
            tokens = record.refill(tokens)
        return tokens

    @torch.no_grad()
    def _first_map(self, tokens: Tensor) -> Tensor | None:
        """Return the head-mean self-attention map of the block's first layer where copies go by it."""
        config = self._atedm.state.config
        if not config.needs_first_map:
            return None
        layer = self.transformer_blocks[0]
        return mean_attention_map(*queries_and_keys(layer.attn1, layer.norm1, tokens))

    def _layer(self, layer: BasicTransformerBlock, tokens: Tensor, call: _Call, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(  # type: ignore[no-any-return]
                layer,
                tokens,
                bias,
                call.encoder_hidden_states,
                call.encoder_attention_mask,
                call.timestep,
                call.cross_attention_kwargs,
                call.class_labels,
            )
        return layer(  # type: ignore[no-any-return]
            tokens,
            attention_mask=bias,
            encoder_hidden_states=call.encoder_hidden_states,
            encoder_attention_mask=call.encoder_attention_mask,
            timestep=call.timestep,
            cross_attention_kwargs=call.cross_attention_kwargs,
            class_labels=call.class_labels,
        )

    def _pruning_layer(
        self,
        index: int,
        layer: BasicTransformerBlock,
        tokens: Tensor,
        count: int,
        size: tuple[int, int],
        call: _Call,
        first_map: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Dropped]:
        """Run the layer in which tokens are dropped.

        They copy by ``first_map`` (B, N, N) where it is given. ``weights`` (B, N) says how many tokens each stands for.
        """
        state = self._atedm.state
        config = state.config
        start = tokens
        bias = _attention_bias(weights, tokens)
        ranking: Ranking
        dropped: Dropped

        @torch.no_grad()  # which tokens are kept has no gradient, and the maps need not wait for one
        def rank(at: Tensor) -> Ranking:
            return rank_tokens(
                config,
                at,
                partial(queries_and_keys, layer.attn1, layer.norm1, start),
                partial(queries_and_keys, layer.attn2, layer.norm2, at, _text(call.encoder_hidden_states)),
                step=state.step,
                size=size,
                count=count,
            )

        def drop(at: Tensor) -> tuple[Tensor, Dropped]:
            copied_by = ranking if first_map is None else ranking._replace(attention_map=first_map)
            kept, record = drop_tokens(at, copied_by, count, size, config, weights)
            for observer in state.observers:
                name, step = self._atedm.place.name, int(state.step)
                observer(BlockObservation(name, index, step, ranking.importance, record.keep, size))
            return kept, record

        if config.place == "before-self-attention":
            ranking = rank(tokens)
            tokens, dropped = drop(tokens)
            return self._layer(layer, tokens, call, _attention_bias(dropped.weights, tokens)), dropped
        if not config.opens_layer:
            tokens = self._layer(layer, tokens, call, bias)
            ranking = rank(tokens)
            return drop(tokens)
        tokens = tokens + _self_attention(layer, tokens, call, bias)
        ranking = rank(tokens)
        if config.place == "after-self-attention":
            tokens, dropped = drop(tokens)
        tokens = tokens + _cross_attention(layer, tokens, call)
        if config.place == "before-feed-forward":
            tokens, dropped = drop(tokens)
        tokens = tokens + layer.ff(layer.norm3(tokens))
        return drop(tokens) if config.place == "after-feed-forward" else (tokens, dropped)


def queries_and_keys(
    attention: AttentionModule, norm: torch.nn.Module, tokens: Tensor, context: Tensor | None = None
) -> QueriesAndKeys:
    """Project (B, N, C) tokens as the attention layer does; keys come from ``context`` where it is given.

    The projections are called, not read, so that LoRA adapters and offload hooks take part.
    """
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
    return QueriesAndKeys(q, k, attention.scale)


def _text(encoder_hidden_states: Any) -> Any:
    """Return the words alone: with an IP-Adapter the image prompts come along in a tuple."""
    return encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states


def _attention_bias(weights: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Turn the ``weights`` (B, N) of tokens into what self-attention adds to its logits, (B, 1, N)."""
    return None if weights is None else weights.log().to(tokens.dtype).unsqueeze(1)


def _self_attention(layer: BasicTransformerBlock, tokens: Tensor, call: _Call, bias: Tensor | None = None) -> Tensor:
    """Return what self-attention, and GLIGEN's gated attention where there is any, add to the tokens."""
    kwargs = dict(call.cross_attention_kwargs or {})
    gligen = kwargs.pop("gligen", None)
    update = layer.attn1(layer.norm1(tokens), encoder_hidden_states=None, attention_mask=bias, **kwargs)
    if gligen is not None:
        update = layer.fuser(tokens + update, gligen["objs"]) - tokens
    return update  # type: ignore[no-any-return]


def _cross_attention(layer: BasicTransformerBlock, tokens: Tensor, call: _Call) -> Tensor:
    kwargs = {key: value for key, value in (call.cross_attention_kwargs or {}).items() if key != "gligen"}
    return layer.attn2(  # type: ignore[no-any-return]
        layer.norm2(tokens),
        encoder_hidden_states=call.encoder_hidden_states,
        attention_mask=call.encoder_attention_mask,
        **kwargs,
    )
