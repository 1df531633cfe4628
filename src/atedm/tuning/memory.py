"""What training a LoRA for a model takes, counted on the meta device, where nothing is held."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atedm.costs.architectures import Architecture, run_once
from atedm.hosts.diffusers_dit import known_family
from atedm.hosts.models import is_transformer
from atedm.tuning.finetune import Training


@dataclass(frozen=True)
class Needs:
    """Bytes for one image at a time; with guidance that is two halves of a call."""

    #: Of the U-Net or transformer.
    weights: int
    #: Of the LoRA, its gradients and the two moments of AdamW, in float32.
    lora: int
    #: Of what a dense call holds until its gradients are taken. A pruned one holds less.
    activations: int

    @property
    def total(self) -> int:
        """All of it. Text encoders and the decoder come on top where they are not offloaded."""
        return self.weights + self.lora + self.activations


def training_needs(
    arch: Architecture, training: Training, dtype: torch.dtype, size: tuple[int, int] | None = None
) -> Needs:
    """Count what a step of training holds.

    Args:
        arch: The model, see `atedm.costs.architectures.architecture`.
        training: Its rank, and whether layers are run again in place of being held.
        dtype: Of weights and activations.
        size: (width, height) in pixels; by default what the model was trained for.

    Raises:
        ImportError: If peft is not installed.
        ValueError: As `Architecture.latents` and `Training.check_for`.
    """
    model = arch.on_meta().requires_grad_(False)
    training.check_for(model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no values to begin with
        model.add_adapter(training.adapter(model))
    of_one = torch.empty((), dtype=dtype).element_size()
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
        parameter.data = parameter.data.to(dtype)
    model.train()
    call = arch.call(size, 2 if arch.guidance else 1, dtype=dtype)
    with FusedAttention():
        held, largest = _held(model, call)
        if training.checkpointing:
            model.enable_gradient_checkpointing()
            held = _held(model, call)[0] + largest  # one layer at a time is run again
    return Needs(of_one * sizes[False], 4 * 4 * sizes[True], held)


def _held(model: Any, call: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes that a call holds for its gradients, and those of the layer that holds most."""
    own = {_storage(parameter) for parameter in model.parameters()}
    seen: dict[int, Any] = {}  # holds on to them, so that no other takes the place of one

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            seen[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in seen.values())

    layers: list[int] = []
    hooks = []
    for module in _layers(model):
        hooks.append(module.register_forward_pre_hook(lambda *_: layers.append(-total())))
        hooks.append(module.register_forward_hook(lambda *_: layers.append(layers.pop() + total())))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if is_transformer(model):
                model(**call)
            else:
                run_once(model, call, 500)
    finally:
        for hook in hooks:
            hook.remove()
    return total(), max(layers, default=0)


class FusedAttention(TorchFunctionMode):
    """Lets attention hold what a fused kernel holds: on the meta device it would be written out, with its maps."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return _Held.apply(given["query"], given["key"], given["value"])


class _Held(torch.autograd.Function):
    """The size of what attention gives, and what fused attention saves for its gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, heads, tokens, _ = query.shape
        # Heads lie side by side, so that the layer behind attention takes what it gives as it is.
        attended = query.new_empty(*batch, tokens, heads, value.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(query, key, value, attended)
        return attended


def _layers(model: nn.Module) -> list[nn.Module]:
    """Those that are run again one at a time."""
    if is_transformer(model):
        return [block for blocks in known_family(model).kinds for block in model.get_submodule(blocks).children()]
    return [module for module in model.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
