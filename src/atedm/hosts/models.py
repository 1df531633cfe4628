"""The models that can be pruned, whatever their family: find one in a pipeline, and switch pruning on and off in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from atedm.hosts import diffusers_unet
from atedm.hosts.diffusers_dit import (
    attach_transformer,
    check_protected_transformer,
    detach_transformer,
    find_transformer,
    find_transformer_spans,
)
from atedm.hosts.dit_families import family_of
from atedm.hosts.state import PATCHING, is_attached, refuse_attached
from atedm.hosts.unet_spans import choose_spans, find_spans, find_unet
from atedm.method.contract import Method, Place


def find_model(target: Any) -> Any:
    """Return the U-Net or the transformer of a pipeline, or ``target`` itself if it is one.

    Raises:
        TypeError: If there is none; the message names what was found and what would work.
    """
    if getattr(target, "unet", None) is None and (transformer := find_transformer(target)) is not None:
        return transformer
    return find_unet(target)


def is_transformer(model: nn.Module) -> bool:
    """Whether a model is a transformer of a known family."""
    return family_of(model) is not None


def spans_of(model: Any) -> Mapping[str, tuple[Place, Any]]:
    """Map the name of every span of a model to its place and what it consists of, in the order they run."""
    return find_transformer_spans(model) if is_transformer(model) else find_spans(model)


def attach(model: Any, method: Method, protect: Tensor | None = None, pipe: Any = None) -> None:
    """Let ``method`` prune a U-Net or a transformer.

    Args:
        model: Not pruned yet.
        method: What prunes.
        protect: (H, W) zeros and ones over the image: what is never dropped.
        pipe: The pipeline that calls it, if there is one: some tell their steps by its scheduler.

    Raises:
        TypeError: If diffusers has changed what the host takes over, or a block is of an unknown class.
        ValueError: If it is pruned already, there is nothing to prune, or a block cannot be pruned as it is. Nothing
            has been changed then.
    """
    refuse_attached(model)
    if is_transformer(model):
        attach_transformer(model, choose_spans(find_transformer_spans(model), method), method, protect, pipe)
    else:
        diffusers_unet.attach(model, method, protect)


def detach(model: Any) -> None:
    """Undo `attach`: the model is exactly as before.

    Raises:
        ValueError: If it is not pruned.
        RuntimeError: If another thread is in the middle of a step of it.
    """
    with PATCHING:
        if not is_attached(model):
            raise ValueError("this model is not patched, so there is nothing to remove")
        model._atedm.caller.refuse_others()
        if is_transformer(model):
            detach_transformer(model)
        else:
            diffusers_unet.detach(model)


def check_protected(target: Any, size: tuple[int, int]) -> None:
    """See before any work that no span will keep fewer tokens than are protected.

    Args:
        target: A patched pipeline or model.
        size: (height, width) of the latents.

    Raises:
        ValueError: If one will; the message names a rate that leaves enough.
    """
    model = find_model(target)
    if is_transformer(model):
        check_protected_transformer(model, size)
    else:
        diffusers_unet.check_protected_unet(model, size)
