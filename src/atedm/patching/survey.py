"""Find what can be pruned in a model, and refuse, before any work, what cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from atedm.config import PruningConfig
from atedm.schedule import BlockPlace

KNOWN_NORM = "layer_norm"
"""The kind of `BasicTransformerBlock` whose queries, keys and insides are known here: that of all SD U-Nets."""
_MERGING = "ToMeBlock"
"""What tomesd calls the class of a layer that it has patched."""
PERTURBED = {PAGCFGIdentitySelfAttnProcessor2_0: 3, PAGIdentitySelfAttnProcessor2_0: 2}
"""Attention processors of perturbed-attention guidance, and the parts of their batch; the last one is perturbed."""


def find_unet(target: Any) -> UNet2DConditionModel:
    """Return the U-Net of a pipeline, or ``target`` itself if it is one, without a `torch.compile` wrapper.

    A ControlNet, which is the first half of a U-Net, counts as one where it is handed over itself.

    Raises:
        TypeError: If there is no `UNet2DConditionModel`; the message names what was found.
    """
    model = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
    model = getattr(model, "_orig_mod", model)
    if type(model) in (UNet2DConditionModel, ControlNetModel):
        return model
    if model is None:
        parts = getattr(target, "components", None)
        parts = parts if isinstance(parts, dict) else {}
        found = ", ".join(
            f"{name}: {type(part).__name__}" for name, part in parts.items() if isinstance(part, nn.Module)
        )
        what = f"{type(target).__name__} has no U-Net" + (f" (it has {found})" if found else "")
    else:
        what = f"found a {type(model).__name__}"
    raise TypeError(
        f"{what}; AT-EDM prunes the attention blocks of a UNet2DConditionModel, so it works on pipelines such as "
        "StableDiffusionXLPipeline or StableDiffusionPipeline, on their .unet, or on a ControlNetModel"
    )


def find_blocks(unet: UNet2DConditionModel) -> dict[str, tuple[BlockPlace, Transformer2DModel]]:
    """Map the name of every attention block to its place and module, in the order they run."""
    stages: list[tuple[Any, int, str, nn.Module]] = []
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
            found[full] = (BlockPlace(stage, level, index, len(blocks), layers, full), module)
    return found


def choose_blocks(
    blocks: dict[str, tuple[BlockPlace, Transformer2DModel]], config: PruningConfig
) -> dict[str, tuple[BlockPlace, Transformer2DModel]]:
    """Return the blocks that ``config`` prunes with something to gain.

    Raises:
        ValueError: If there are none, or one of them is of a kind or in a state that cannot be pruned.
    """
    if not blocks:
        raise ValueError("this U-Net has no attention blocks (Transformer2DModel), so there is nothing to prune")
    wanted = {name: found for name, found in blocks.items() if config.prunes(found[0])}
    if not wanted:
        raise ValueError(f"where={config.as_dict()['where']!r} names none of the {len(blocks)} attention blocks")
    gaining = {name: found for name, found in wanted.items() if config.rates_in(found[0])}
    if not gaining:
        depth = max(place.layers for place, _ in wanted.values())
        raise ValueError(_nothing_to_gain(depth, config))
    for name, (_, module) in gaining.items():
        _refuse_unknown(name, module)
        if config.opens_layer:
            _refuse_changed(name, module, [layer for layer, _ in config.rates])
    return gaining


def _nothing_to_gain(depth: int, config: PruningConfig) -> str:
    first = config.rates[0][0]
    if config.place == "after-feed-forward" and first < depth:
        return (
            f"nothing to prune: the attention blocks of this model have {depth} layer{'s' if depth > 1 else ''}, and "
            f"after the feed-forward of layer {first} none is left to run on fewer tokens"
            f"{', as in SD 1.x and 2.x' if depth == 1 else ''}; "
            'PruningConfig(place="after-self-attention") works here'
        )
    return f"nothing to prune: the attention blocks of this model have no layer {first}, but {depth}"


def _refuse_unknown(name: str, module: Transformer2DModel) -> None:
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
        if kind != KNOWN_NORM or layer.pos_embed is not None or layer.only_cross_attention or layer.attn2 is None:
            raise ValueError(
                f"{where} is of a kind not known here (norm {kind!r}, with positions: {layer.pos_embed is not None}, "
                f"cross-attention only: {layer.only_cross_attention}); known is the layer of SD and SDXL U-Nets"
            )
    refuse_chunking(name, module)
    refuse_merging(name, module)


def _refuse_changed(name: str, module: Transformer2DModel, pruning_layers: Sequence[int]) -> None:
    """Raise if a layer that is to be run part by part has a forward that is not diffusers' own."""
    for index, layer in enumerate(module.transformer_blocks):
        if index in pruning_layers and (type(layer) is not BasicTransformerBlock or "forward" in vars(layer)):
            raise ValueError(
                f"the forward of {name}.transformer_blocks.{index} is overridden (by another patch, or by an offload "
                "hook), and would be passed over when tokens are dropped or ranked inside the layer; apply atedm "
                'first, or prune with place="after-feed-forward" and a ranking by self-attention'
            )


def refuse_merging(name: str, module: Transformer2DModel) -> None:
    """Raise if tomesd has patched a layer: it lays what it merges over a grid, which kept tokens do not fill."""
    if any(type(layer).__name__ == _MERGING for layer in module.transformer_blocks):
        raise ValueError(
            f"the layers of {name} merge tokens (tomesd), which needs the whole grid that pruning takes apart; "
            "call tomesd.remove_patch(...), or leave pruning out"
        )


def refuse_perturbed(unet: UNet2DConditionModel) -> None:
    """Raise if guidance perturbs attention: its batch has a part that is no half of guidance."""
    if any(type(processor) in PERTURBED for processor in unet.attn_processors.values()):
        raise ValueError(
            "guidance_masks='shared' shares what is kept between the two halves of guidance, but under "
            "perturbed-attention guidance a batch has another part; use guidance_masks='separate'"
        )


def refuse_chunking(name: str, module: Transformer2DModel) -> None:
    """Raise if the feed-forward is chunked over tokens: the number of tokens left need not divide."""
    for layer in module.transformer_blocks:
        if layer._chunk_size is not None and layer._chunk_dim == 1:
            raise ValueError(
                f"{name} has forward chunking over tokens on (dim=1), which cannot be honoured with fewer of them; "
                "call set_chunk_feed_forward(None) on its layers, or chunk over the batch with dim=0"
            )
