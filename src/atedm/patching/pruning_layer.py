"""The layer of a block in which tokens are ranked, chosen and dropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as AttentionModule
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    SlicedAttnProcessor,
)
from torch import Tensor
from torch.nn import functional

from atedm.patching.state import BlockObservation, BlockPatch
from atedm.patching.survey import PERTURBED
from atedm.protection import protected_tokens, with_protected
from atedm.token_pruning import Choice, Dropped, choose_tokens, drop_tokens, match_tokens
from atedm.token_ranking import QueriesAndKeys, Ranking, rank_tokens

_MAKE_LOGITS = (AttnProcessor, SlicedAttnProcessor, CustomDiffusionAttnProcessor)


class Call(NamedTuple):
    """The arguments that every layer of a block is handed."""

    encoder_hidden_states: Any
    encoder_attention_mask: Tensor | None
    timestep: Any
    cross_attention_kwargs: dict[str, Any] | None
    class_labels: Any


class Cut(NamedTuple):
    """What one pruning layer did."""

    choice: Choice
    dropped: Dropped


@dataclass(frozen=True)
class PruningLayer:
    """One layer in which tokens are dropped, and what that takes."""

    patch: BlockPatch
    index: int
    layer: BasicTransformerBlock
    #: Tokens that are left.
    count: int
    #: (h, w) of the block's grid.
    size: tuple[int, int]
    call: Call
    #: (B, N, N), where copies go by the map of the first layer.
    first_map: Tensor | None
    #: (B, N), how many tokens each stands for.
    weights: Tensor | None
    #: What was chosen in an earlier step, where that still holds.
    recalled: Choice | None

    @property
    def place(self) -> str:
        """Where in the layer they are dropped."""
        config = self.patch.state.config
        return config.place if self.recalled is None else config.place_of_reuse

    @property
    def opens(self) -> bool:
        """Whether the layer is run part by part."""
        by_words = self.recalled is None and self.patch.state.config.ranks_by_words
        return self.place != "after-feed-forward" or by_words

    def rank(self, tokens: Tensor, start: Tensor) -> Ranking | None:
        """Rank ``tokens``, which entered the layer as ``start``; None where that is settled."""
        if self.recalled is not None:
            return None
        # Which tokens are kept has no gradient, and the maps need not wait for one. Not a decorator, which torch 2.14
        # does not compile over a method of an object that is made on the way.
        with torch.no_grad():
            return self._rank(tokens, start)

    def _rank(self, tokens: Tensor, start: Tensor) -> Ranking:
        state, layer = self.patch.state, self.layer
        ranking = rank_tokens(
            state.config,
            tokens,
            partial(queries_and_keys, layer.attn1, layer.norm1, start),
            partial(
                queries_and_keys,
                layer.attn2,
                layer.norm2,
                tokens,
                text_of(self.call.encoder_hidden_states),
                self.call.encoder_attention_mask,
            ),
            step=state.step,
            size=self.size,
            count=self.count,
        )
        if state.protect is not None:
            protected = protected_tokens(state.protect, self.size).to(tokens.device)
            ranking = ranking._replace(importance=with_protected(ranking.importance, protected))
        return ranking if self.first_map is None else ranking._replace(attention_map=self.first_map, source=None)

    def drop(self, tokens: Tensor, ranking: Ranking | None) -> tuple[Tensor, Cut]:
        """Choose by the ranking, unless that is settled, and drop the others."""
        patch, config = self.patch, self.patch.state.config
        choice = self.recalled
        if ranking is not None:
            choice = choose_tokens(tokens, ranking, self.count, self.size, config, self.weights)
        assert choice is not None
        if self.recalled is not None and config.rematch:
            choice = match_tokens(tokens, choice, None, self.size, config, self.weights)
        kept, dropped = drop_tokens(tokens, choice, self.size, config, self.weights, patch.memory.updates)
        for observer in patch.state.observers:
            name, step = patch.place.name, int(patch.state.step)
            observer(BlockObservation(name, self.index, step, choice.importance, choice.keep, self.size))
        return kept, Cut(choice, dropped)


def queries_and_keys(
    attention: AttentionModule,
    norm: torch.nn.Module,
    tokens: Tensor,
    context: Tensor | None = None,
    bias: Tensor | None = None,
) -> QueriesAndKeys:
    """Project (B, N, C) tokens as the attention layer does; keys come from ``context`` where it is given.

    The projections are called, not read, so that LoRA adapters and offload hooks take part. A ``bias`` (B, 1, words) on
    the logits, by which padded words are masked, comes in one column more of both.
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
    if bias is not None:
        q, k = _with_bias(q, k, bias, attention.scale)
    return QueriesAndKeys(q, k, attention.scale)


def _with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Let a bias (B, 1, words) on the logits ride in their product, as one on queries and over the scale on keys."""
    largest = torch.finfo(k.dtype).max
    column = (bias.float() / scale).to(k.dtype).clamp(-largest, largest)
    column = column.unsqueeze(-1).expand(*k.shape[:3], 1)
    return functional.pad(q, (0, 1), value=1.0), torch.cat([k, column], dim=-1)


def text_of(encoder_hidden_states: Any) -> Any:
    """Return the words alone: with an IP-Adapter the image prompts come along in a tuple."""
    return encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states


def bias_for(attention: AttentionModule, bias: Tensor | None) -> Tensor | None:
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


def attention_bias(weights: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Turn the ``weights`` (B, N) of tokens into what self-attention adds to its logits, (B, 1, N)."""
    return None if weights is None else weights.log().to(tokens.dtype).unsqueeze(1)
