"""Find the spans of a U-Net, and refuse before any work what cannot be pruned."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import diffusers
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    MultiControlNetModel,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from atedm.hosts.dit_families import FAMILIES, family_of
from atedm.hosts.wrapped import unwrapped
from atedm.method.contract import Method, Place

WRITTEN_FOR = "0.33 to 0.42"
"""Releases of diffusers that this host is tested with."""
_MERGING = "ToMeBlock"
"""What tomesd calls the class of a layer that it has patched."""

PRUNABLE = (UNet2DConditionModel, ControlNetModel, ControlNetUnionModel, UNetMotionModel, UNetControlNetXSModel)
"""Models whose attention blocks are known here."""

_CALL = ("encoder_hidden_states", "timestep", "cross_attention_kwargs", "class_labels")
_MASKS = ("attention_mask", "encoder_attention_mask")
#: What the host takes over or calls, with the arguments that it knows of. One more, which it would not hand on, counts
#: as much as one less.
KNOWN: tuple[tuple[type, str, frozenset[str]], ...] = (
    (Transformer2DModel, "forward", frozenset({"hidden_states", "added_cond_kwargs", "return_dict", *_CALL, *_MASKS})),
    (Transformer2DModel, "_operate_on_continuous_inputs", frozenset({"hidden_states"})),
    (
        Transformer2DModel,
        "_get_output_for_continuous_inputs",
        frozenset({"hidden_states", "residual", "batch_size", "height", "width", "inner_dim"}),
    ),
    (BasicTransformerBlock, "forward", frozenset({"hidden_states", "added_cond_kwargs", *_CALL, *_MASKS})),
)

UnetSpans = Mapping[str, tuple[Place, Transformer2DModel]]
"""Place and module of every span, by name, in the order they run."""

M = TypeVar("M")


def find_unet(target: Any) -> UNet2DConditionModel:
    """Return the U-Net of a pipeline, or ``target`` itself if it is one.

    A wrapper of `torch.compile` or `DistributedDataParallel` is looked through. Subclasses count, and so do
    `UNetMotionModel` (AnimateDiff), whose spatial blocks are ordinary, `UNetControlNetXSModel`, and a ControlNet handed
    over itself.

    Raises:
        TypeError: If there is none; the message names what was found and what would work.
    """
    model = unwrapped(target if isinstance(target, nn.Module) else getattr(target, "unet", None))
    if isinstance(model, PRUNABLE):
        return model
    transformer = getattr(target, "transformer", None) if model is None else model
    if isinstance(transformer, nn.Module) and family_of(unwrapped(transformer)) is not None:
        raise TypeError(
            f"found a {type(unwrapped(transformer)).__name__}; this works on U-Nets only so far. atedm.apply prunes it"
        )
    if isinstance(model, MultiControlNetModel):
        raise TypeError(
            "found a MultiControlNetModel; prune its ControlNets one by one: atedm.apply(each) for its .nets"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "found a DataParallel, which runs copies in threads; use DistributedDataParallel, or prune .module"
        )
    if model is None:
        parts = getattr(target, "components", None)
        parts = parts if isinstance(parts, dict) else {}
        found = ", ".join(
            f"{name}: {type(part).__name__}" for name, part in parts.items() if isinstance(part, nn.Module)
        )
        what = f"{type(target).__name__} has no U-Net and no transformer known here" + (
            f" (it has {found})" if found else ""
        )
    else:
        what = f"found a {type(model).__name__}"
    raise TypeError(
        f"{what}; atedm prunes the attention blocks of a UNet2DConditionModel, so it works on pipelines such as "
        "StableDiffusionXLPipeline or StableDiffusionPipeline, on their .unet, or on a ControlNetModel; and the blocks "
        f"of these transformers: {', '.join(family.name for family in FAMILIES.values())}"
    )


def find_spans(unet: UNet2DConditionModel) -> dict[str, tuple[Place, Transformer2DModel]]:
    """Map the name of every attention block to its place and module, in the order they run."""
    stages: list[tuple[str, int, str, nn.Module]] = []
    levels, up_blocks = len(unet.down_blocks), getattr(unet, "up_blocks", ())  # a ControlNet has none
    stages += [("down", i + 1, f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    if unet.mid_block is not None:
        stages += [("mid", levels, "mid_block", unet.mid_block)]
    stages += [("up", levels - i, f"up_blocks.{i}", block) for i, block in enumerate(up_blocks)]
    found = {}
    for stage, level, prefix, parent in stages:
        blocks = [(name, m) for name, m in parent.named_modules() if isinstance(m, Transformer2DModel)]
        for index, (name, module) in enumerate(blocks):
            full = f"{prefix}.{name}"
            layers = len(module.transformer_blocks)
            found[full] = (Place(stage, level, index, len(blocks), layers, full), module)
    return found


def choose_spans(spans: Mapping[str, tuple[Place, M]], method: Method) -> dict[str, tuple[Place, M]]:
    """Return the spans in which ``method`` has something to prune, whatever its rate.

    Raises:
        ValueError: If there are none; the message says why and what would work.
    """
    if not spans:
        raise ValueError(
            "this model has no attention blocks (Transformer2DModel), or it is a transformer with no more than the two "
            "blocks that run on all tokens, so there is nothing to prune"
        )
    half = replace(method, rate=0.5)  # type: ignore[type-var]
    chosen = {name: found for name, found in spans.items() if half.count(found[0], 1024) < 1024}
    if chosen:
        return chosen
    depth = max(place.layers for place, _ in spans.values())
    if depth <= method.dense_layers:
        raise ValueError(
            f"nothing to prune: the attention blocks of this model have {depth} layer{'s' if depth > 1 else ''}, as "
            f"those of SD 1.x and 2.x have, and {method.name} runs {method.dense_layers} on all tokens; "
            'atedm.apply(pipe, "matched") works here'
        )
    raise ValueError(f"nothing to prune: {method.name} names none of the {len(spans)} attention blocks")


def refuse_drift() -> None:
    """Raise a `TypeError` if diffusers is no longer what this host was written for; it names what has changed."""
    for kind, name, known in KNOWN:
        method = getattr(kind, name, None)
        found = frozenset() if method is None else frozenset(inspect.signature(method).parameters) - {"self"}
        if found != known:
            changed = ", ".join(sorted(found ^ known))
            raise TypeError(
                f"diffusers {diffusers.__version__} has another {kind.__name__}.{name} ({changed}) than atedm was "
                f"written for; install diffusers {WRITTEN_FOR}, or a newer atedm"
            )


def refuse_unknown(name: str, module: Transformer2DModel) -> None:
    """Raise if an attention block is of a kind, or in a state, that cannot be pruned."""
    if type(module) is not Transformer2DModel:
        raise TypeError(f"{name} is a {type(module).__name__}, not diffusers' own Transformer2DModel")
    if not module.is_input_continuous:
        raise ValueError(f"{name} works on patches or on discrete latents; only feature maps can be pruned")
    if "forward" in vars(module):
        raise ValueError(
            f"the forward of {name} is already overridden on the instance (by another patch, or by an offload hook); "
            "apply atedm first, then that"
        )
    for index, layer in enumerate(module.transformer_blocks):
        where = f"{name}.transformer_blocks.{index}"
        # Subclasses are what other patches make of a layer; they run as they are.
        if not isinstance(layer, BasicTransformerBlock):
            raise TypeError(f"{where} is a {type(layer).__name__}, not a BasicTransformerBlock")
        kind = layer.norm_type
        if kind != "layer_norm" or layer.pos_embed is not None or layer.only_cross_attention or layer.attn2 is None:
            raise ValueError(
                f"{where} is of a kind not known here (norm {kind!r}, with positions: {layer.pos_embed is not None}, "
                f"cross-attention only: {layer.only_cross_attention}); known is the layer of SD and SDXL U-Nets"
            )
    refuse_at_call(name, module)


def refuse_at_call(name: str, module: Transformer2DModel) -> None:
    """Raise if something that can be switched on later makes pruning impossible: looked at before every step."""
    for layer in module.transformer_blocks:
        if type(layer).__name__ == _MERGING:  # it lays what it merges over a grid, which kept tokens do not fill
            raise ValueError(
                f"the layers of {name} merge tokens (tomesd), which needs the whole grid that pruning takes apart; "
                "call tomesd.remove_patch(...), or leave pruning out"
            )
        if layer._chunk_size is not None and layer._chunk_dim == 1:  # the number of tokens left need not divide
            raise ValueError(
                f"{name} has forward chunking over tokens on (dim=1), which cannot be honoured with fewer of them; "
                "call set_chunk_feed_forward(None) on its layers, or chunk over the batch with dim=0"
            )
