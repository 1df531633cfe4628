"""The attention block that prunes: diffusers' `Transformer2DModel` with tokens dropped between or inside its layers.

A patched block is the same object with its class swapped for `PrunedTransformer2DModel`. Weights, hooks, adapters,
processors and names stay as they are, the layers themselves run diffusers' own code, and swapping the class back
restores everything.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from atedm.attention_map import mean_attention_map
from atedm.patching.pruning_layer import Call, Cut, PruningLayer, attention_bias, bias_for, queries_and_keys
from atedm.patching.state import BlockPatch
from atedm.pruning import gather_submap
from atedm.token_pruning import Choice, Dropped


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
        call = Call(encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs, class_labels)
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

    def _layers(self, tokens: Tensor, counts: dict[int, int], size: tuple[int, int], call: Call) -> Tensor:
        """Run all layers over (B, N, C) tokens and give (B, N, C) back."""
        dropped: list[Dropped] = []
        choices: dict[int, Choice] = {}
        weights: Tensor | None = None
        bias: Tensor | None = None
        memory = self._atedm.memory
        recalled = memory.recall(counts, *tokens.shape[:2])
        first_map = None if recalled else self._first_map(tokens)
        for index, layer in enumerate(self.transformer_blocks):
            if index in counts:
                here = PruningLayer(
                    self._atedm, index, layer, counts[index], size, call, first_map, weights, recalled.get(index)
                )
                tokens, cut = self._pruning_layer(here, tokens)
                choices[index] = cut.choice
                dropped.append(cut.dropped)
                weights = cut.dropped.weights
                bias = attention_bias(weights, tokens)
                if first_map is not None:
                    first_map = gather_submap(first_map, cut.choice.keep)
            else:
                tokens = self._layer(layer, tokens, call, bias)
        for record in reversed(dropped):
            tokens = record.refill(tokens)
        if self._atedm.state.config.refresh_every > 1 and not recalled:
            memory.remember(choices)
        return tokens

    @torch.no_grad()
    def _first_map(self, tokens: Tensor) -> Tensor | None:
        """Return the head-mean self-attention map of the block's first layer where copies go by it."""
        config = self._atedm.state.config
        if not config.needs_first_map:
            return None
        layer = self.transformer_blocks[0]
        return mean_attention_map(*queries_and_keys(layer.attn1, layer.norm1, tokens))

    def _layer(self, layer: BasicTransformerBlock, tokens: Tensor, call: Call, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(  # type: ignore[no-any-return]
                layer,
                tokens,
                bias_for(layer.attn1, bias),
                call.encoder_hidden_states,
                call.encoder_attention_mask,
                call.timestep,
                call.cross_attention_kwargs,
                call.class_labels,
            )
        return layer(  # type: ignore[no-any-return]
            tokens,
            attention_mask=bias_for(layer.attn1, bias),
            encoder_hidden_states=call.encoder_hidden_states,
            encoder_attention_mask=call.encoder_attention_mask,
            timestep=call.timestep,
            cross_attention_kwargs=call.cross_attention_kwargs,
            class_labels=call.class_labels,
        )

    def _pruning_layer(self, here: PruningLayer, tokens: Tensor) -> tuple[Tensor, Cut]:
        """Run the layer in which tokens are dropped."""
        layer, call = here.layer, here.call
        bias = attention_bias(here.weights, tokens)
        start = tokens
        if here.place == "before-self-attention":
            tokens, cut = here.drop(tokens, here.rank(tokens, start))
            return self._layer(layer, tokens, call, attention_bias(cut.dropped.weights, tokens)), cut
        if not here.opens:
            tokens = self._layer(layer, tokens, call, bias)
            return here.drop(tokens, here.rank(tokens, start))
        tokens = tokens + _self_attention(layer, tokens, call, bias)
        ranking = here.rank(tokens, start)
        if here.place == "after-self-attention":
            tokens, cut = here.drop(tokens, ranking)
        tokens = tokens + _cross_attention(layer, tokens, call)
        if here.place == "before-feed-forward":
            tokens, cut = here.drop(tokens, ranking)
        tokens = tokens + layer.ff(layer.norm3(tokens))
        return here.drop(tokens, ranking) if here.place == "after-feed-forward" else (tokens, cut)


def _self_attention(layer: BasicTransformerBlock, tokens: Tensor, call: Call, bias: Tensor | None = None) -> Tensor:
    """Return what self-attention, and GLIGEN's gated attention where there is any, add to the tokens."""
    kwargs = dict(call.cross_attention_kwargs or {})
    gligen = kwargs.pop("gligen", None)
    bias = bias_for(layer.attn1, bias)
    update = layer.attn1(layer.norm1(tokens), encoder_hidden_states=None, attention_mask=bias, **kwargs)
    if gligen is not None:
        update = layer.fuser(tokens + update, gligen["objs"]) - tokens
    return update  # type: ignore[no-any-return]


def _cross_attention(layer: BasicTransformerBlock, tokens: Tensor, call: Call) -> Tensor:
    kwargs = {key: value for key, value in (call.cross_attention_kwargs or {}).items() if key != "gligen"}
    return layer.attn2(  # type: ignore[no-any-return]
        layer.norm2(tokens),
        encoder_hidden_states=call.encoder_hidden_states,
        attention_mask=call.encoder_attention_mask,
        **kwargs,
    )
