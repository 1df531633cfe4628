"""ToMe by the package of its authors, with the paper's schedule laid over it if asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from atedm.costs.tome import ToMe
from atedm.patching.steps import step_position
from atedm.patching.survey import find_blocks
from atedm.schedule import is_prune_less, prune_less_blocks


@contextmanager
def with_tomesd(unet: UNet2DConditionModel, tome: ToMe, seed: int = 0) -> Iterator[None]:
    """Run a U-Net with ToMe for the length of a ``with`` block.

    Args:
        unet: Not patched by ``tomesd``.
        tome: The setting.
        seed: Of the destinations that ToMe draws in every layer of every step, where a batch is even.

    Raises:
        ImportError: If ``tomesd`` is not installed.
    """
    try:
        import tomesd
    except ImportError as error:
        raise ImportError("ToMe needs the tomesd package: pip install 'atedm[peers]'") from error
    everything = tome.merge == "everything"
    tomesd.apply_patch(
        unet,
        ratio=tome.ratio,
        max_downsample=1 if tome.levels == "highest" else 8,
        merge_attn=True,
        merge_crossattn=everything,
        merge_mlp=everything,
    )
    info = unet._tome_info
    # Drawn from a generator of its own: by default it is a copy of the global one, which depends on what ran before.
    info["args"]["generator"] = torch.Generator("cpu").manual_seed(seed)
    try:
        if tome.prune_less_share > 0:
            info["hooks"].append(_spare_early(unet, tome))
        yield
    finally:
        tomesd.remove_patch(unet)
        for module in unet.modules():  # which remove_patch leaves behind
            vars(module).pop("_tome_info", None)


def _spare_early(unet: UNet2DConditionModel, tome: ToMe) -> Any:
    """Give the spared blocks a setting of their own, whose ratio is 0 in prune-less steps."""
    info = unet._tome_info
    own: dict[str, Any] = {"size": None, "hooks": [], "args": dict(info["args"])}
    blocks = find_blocks(unet)
    for name in prune_less_blocks((place for place, _ in blocks.values()), tome.unpruned_blocks):
        for layer in blocks[name][1].transformer_blocks:
            layer._tome_info = own

    def before_forward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        less = is_prune_less(step_position(timestep).share, "prune-less-early", tome.prune_less_share)
        own["size"] = info["size"]
        own["args"]["ratio"] = 0.0 if less else tome.ratio

    return unet.register_forward_pre_hook(before_forward, with_kwargs=True)
