"""Whether diffusers still has the shape that the patch was written for; if not, that is said before any change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel

WRITTEN_FOR = "0.33 to 0.42"
"""Releases of diffusers that the patch is tested with."""

_CALL = ("encoder_hidden_states", "timestep", "cross_attention_kwargs", "class_labels")
_MASKS = ("attention_mask", "encoder_attention_mask")

#: What the patch takes over or calls, with the arguments that it knows of. One more, which it would not hand on, counts
#: as much as one less.
KNOWN: tuple[tuple[type, str, frozenset[str]], ...] = (
    (
        Transformer2DModel,
        "forward",
        frozenset({"hidden_states", "added_cond_kwargs", "return_dict", *_CALL, *_MASKS}),
    ),
    (Transformer2DModel, "_operate_on_continuous_inputs", frozenset({"hidden_states"})),
    (
        Transformer2DModel,
        "_get_output_for_continuous_inputs",
        frozenset({"hidden_states", "residual", "batch_size", "height", "width", "inner_dim"}),
    ),
    (BasicTransformerBlock, "forward", frozenset({"hidden_states", "added_cond_kwargs", *_CALL, *_MASKS})),
)


def refuse_drift() -> None:
    """Raise if what the patch takes over is not what it was written for.

    Raises:
        TypeError: The message names the versions and what has changed.
    """
    for kind, name, known in KNOWN:
        method: Callable[..., Any] | None = getattr(kind, name, None)
        found = frozenset() if method is None else frozenset(inspect.signature(method).parameters) - {"self"}
        if found != known:
            changed = ", ".join(sorted(found ^ known))
            raise TypeError(
                f"diffusers {diffusers.__version__} has another {kind.__name__}.{name} ({changed}) than atedm was "
                f"written for; install diffusers {WRITTEN_FOR}, or a newer atedm"
            )
