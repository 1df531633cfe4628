"""The attention block of a `Variant`: tokens are dropped before, inside or after any of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from atedm.hosts.attention import attention_bias, queries_and_keys
from atedm.hosts.diffusers_unet import LayerInputs, PrunedTransformer2DModel
from atedm.lab.ablation.choosing import Choice, Ranking, Remembered, choose, drop, rank_tokens
from atedm.method.contract import Cut, View


class AblatedTransformer2DModel(PrunedTransformer2DModel):
    """A `PrunedTransformer2DModel` in which a `Variant` says where in which layers tokens are dropped."""

    def _layers(self, tokens: Tensor, size: tuple[int, int], inputs: LayerInputs) -> Tensor:
        span = self._atedm
        variant: Any = span.model.method
        counts = variant.counts_by_layer(span.place, tokens.shape[1], early=span.model.early)
        recalled, age = self._recall(counts, tokens)
        cuts: list[Cut] = []
        choices: dict[int, Choice] = {}
        bias: Tensor | None = None
        for index, layer in enumerate(self.transformer_blocks):
            if index not in counts:
                tokens = self._layer(layer, tokens, inputs, bias)
                continue
            view = replace(self._view(tokens, tokens, size, inputs), count=counts[index])
            tokens, cut, choices[index] = self._dropping_layer(layer, view, inputs, recalled.get(index))
            span.model.observe(span.place.name, index, cut, size)
            cuts.append(cut)
            bias = attention_bias(cut.weights, tokens)
        for cut in reversed(cuts):
            tokens = cut.refill(tokens)
        if variant.refresh_every > 1:
            last = span.memory.last if span.memory.is_new else None
            span.memory.store(Remembered(None if last is None else last.updates, choices, age))
        return tokens

    def _recall(self, counts: dict[int, int], tokens: Tensor) -> tuple[dict[int, Choice], int]:
        """Choices of an earlier step that still hold, and how many steps ago they were made."""
        last, variant = self._atedm.memory.last, self._atedm.model.method
        if last is None or last.choices is None or last.age + 1 >= variant.refresh_every:  # type: ignore[attr-defined]
            return {}, 0
        fits = last.choices.keys() == counts.keys()
        fits = fits and last.choices[min(counts)].importance.shape == tokens.shape[:2]
        fits = fits and all(last.choices[layer].keep.shape[1] == count for layer, count in counts.items())
        return (last.choices, last.age + 1) if fits else ({}, 0)

    def _dropping_layer(
        self, layer: BasicTransformerBlock, view: View, inputs: LayerInputs, recalled: Choice | None
    ) -> tuple[Tensor, Cut, Choice]:
        """Run the layer in which tokens are dropped; ``view.tokens`` are those that enter it."""
        variant: Any = self._atedm.model.method
        start = view.tokens

        def view_of(tokens: Tensor) -> View:
            words = (inputs.encoder_hidden_states, inputs.encoder_attention_mask)
            return replace(
                view,
                tokens=tokens,
                self_attention=lambda: queries_and_keys(layer.attn1, layer.norm1, start),
                cross_attention=lambda: queries_and_keys(layer.attn2, layer.norm2, tokens, *words),
            )

        def ranked(tokens: Tensor) -> Ranking | Choice:
            return rank_tokens(variant, view_of(tokens)) if recalled is None else recalled

        def dropped(tokens: Tensor, found: Ranking | Choice) -> tuple[Cut, Choice]:
            at = view_of(tokens)
            choice = found if isinstance(found, Choice) else choose(variant, at, found)
            return drop(variant, at, choice), choice

        if variant.place == "before-self-attention":
            cut, choice = dropped(start, ranked(start))
            return self._layer(layer, cut.tokens, inputs, attention_bias(cut.weights, cut.tokens)), cut, choice
        if variant.place == "after-feed-forward" and not (variant.ranks_by_words and recalled is None):
            tokens = self._layer(layer, start, inputs)
            cut, choice = dropped(tokens, ranked(tokens))
            return cut.tokens, cut, choice
        tokens = start + _self_attention(layer, start, inputs)
        ranking = ranked(tokens)
        parts: dict[str, Callable[[Tensor], Tensor]] = {
            "after-self-attention": lambda tokens: tokens + _cross_attention(layer, tokens, inputs),
            "before-feed-forward": lambda tokens: tokens + layer.ff(layer.norm3(tokens)),
            "after-feed-forward": lambda tokens: tokens,
        }
        for place, run_what_follows in parts.items():
            if place == variant.place:
                cut, choice = dropped(tokens, ranking)
                tokens = cut.tokens
            tokens = run_what_follows(tokens)
        return tokens, cut, choice

    @staticmethod
    def check(name: str, module: Transformer2DModel, variant: Any) -> None:
        """Raise a `ValueError` if a layer that is to be run part by part has a forward that is not diffusers' own."""
        if variant.place in ("before-self-attention", "after-feed-forward") and not variant.ranks_by_words:
            return
        for index, _ in variant.drops:
            layer = module.transformer_blocks[index] if index < len(module.transformer_blocks) else None
            if layer is not None and (type(layer) is not BasicTransformerBlock or "forward" in vars(layer)):
                raise ValueError(
                    f"the forward of {name}.transformer_blocks.{index} is overridden (by another patch, or by an "
                    "offload hook), and would be passed over when tokens are dropped or ranked inside the layer; "
                    'apply atedm first, or prune with place="after-feed-forward" and a ranking by self-attention'
                )


def _self_attention(layer: BasicTransformerBlock, tokens: Tensor, inputs: LayerInputs) -> Tensor:
    """Return what self-attention, and GLIGEN's gated attention where there is any, add to the tokens."""
    kwargs = dict(inputs.cross_attention_kwargs or {})
    gligen = kwargs.pop("gligen", None)
    update: Tensor = layer.attn1(layer.norm1(tokens), encoder_hidden_states=None, attention_mask=None, **kwargs)
    if gligen is not None:
        update = layer.fuser(tokens + update, gligen["objs"]) - tokens
    return update


def _cross_attention(layer: BasicTransformerBlock, tokens: Tensor, inputs: LayerInputs) -> Tensor:
    kwargs = {key: value for key, value in (inputs.cross_attention_kwargs or {}).items() if key != "gligen"}
    return layer.attn2(  # type: ignore[no-any-return]
        layer.norm2(tokens),
        encoder_hidden_states=inputs.encoder_hidden_states,
        attention_mask=inputs.encoder_attention_mask,
        **kwargs,
    )
