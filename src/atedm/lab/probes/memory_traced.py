"""Follow the tensors of one U-Net call on the meta device, where nothing is computed, and see what they take.

Every tensor storage is followed from the operation that makes it to the end of its last reference. Each operation
lasts as long as a roofline of an A100 says, and averages are over that time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from atedm.costs.architectures import run_once
from atedm.words import check_name

ATTENTIONS = ("fused", "plain")
"""How attention runs: without ever holding its N x N map, or with the maps of all heads at once, before and after the
softmax, as diffusers does where there is no fused kernel."""
HALF_FLOPS, FLOAT_FLOPS = 312e12, 19.5e12
"""Operations a second of an A100 by its data sheet: in float16 and bfloat16, and in float32 without TF32."""
BANDWIDTH = 1555e9
"""Bytes a second of the 40 GB A100, the paper's GPU."""


@dataclass(frozen=True)
class Footprint:
    """Activation memory of one call of a U-Net."""

    #: Most bytes at one time.
    peak: int
    #: Bytes, averaged over the time the call takes.
    average: float
    #: How long the call takes.
    seconds: float


def traced_footprint(
    unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int, *, attention: str = "fused"
) -> Footprint:
    """Follow the activations of one ``call`` of ``unet`` on the meta device, patched or not.

    A patched U-Net tells by the ``timestep`` where in the run it is; ``attention`` is one of `ATTENTIONS`.

    Raises:
        ValueError: If ``unet`` is not on the meta device, or ``attention`` is unknown.
    """
    timeline = traced_timeline(unet, call, timestep, attention=attention)
    return Footprint(max(held for _, held in timeline), mean(timeline), sum(seconds for seconds, _ in timeline))


def traced_timeline(
    unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int, *, attention: str = "fused"
) -> list[tuple[float, int]]:
    """Return (seconds, bytes held) of every operation of one call that moves data, in order; see `traced_footprint`."""
    check_name("attention", attention, ATTENTIONS)
    if unet.device.type != "meta":
        raise ValueError(f"only a U-Net on the meta device can be traced, not one on {unet.device}")
    tracer = Tracer()
    with torch.no_grad(), _AsOnCuda(_fused if attention == "fused" else _plain), tracer:
        run_once(unet, call, timestep)
    return tracer.timeline


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, notes how many bytes are held during each operation on the meta device, and how long that takes.

    Held are storages, not tensors, so that views count once. A storage is new if no argument of the operation has it;
    what was there before, such as weights, is never new. The references are weak, and end when the storage does.
    """

    timeline: list[tuple[float, int]]
    """(seconds, bytes held) of each operation that moves data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline = []
        self._held: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it did."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = _on_meta((args, kwargs)), _on_meta(out)
        new = {tensor.untyped_storage() for tensor in made} - {tensor.untyped_storage() for tensor in given}
        self._held |= new
        if new or (made and func._schema.is_mutable):  # anything else is a view
            seconds = roofline(func, args, kwargs, out)
            self.timeline.append((seconds, sum(storage.nbytes() for storage in self._held)))
        return out


def roofline(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Seconds of an operation of torch on an A100: its arithmetic or its traffic, whichever takes longer."""
    name = func._schema.name.removeprefix("aten::")
    is_factory = name.startswith("new_") or name.endswith("_like")  # such take a shape from a tensor and read nothing
    touched = [*([] if is_factory else _on_meta((args, kwargs))), *_on_meta(out)]
    # An expanded tensor is read where it lies, not as large as it looks.
    traffic = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in touched)
    count = flop_registry.get(func._overloadpacket)
    flops = count(*args, **kwargs, out_val=out) if count else 0
    speed = HALF_FLOPS if touched[0].element_size() == 2 else FLOAT_FLOPS
    return max(flops / speed, traffic / BANDWIDTH)


def _on_meta(tree: Any) -> list[Tensor]:
    """The tensors in it, without those of the host, such as the index of the step."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]


class _AsOnCuda(TorchFunctionMode):
    """Take on the meta device the ways that CUDA would take, where they differ in memory."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is torch.softmax:
            return _softmax(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]
    return out


def _plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    scores = query @ key.mT  # the factor on it is part of the product
    if attn_mask is not None:
        scores = scores + attn_mask
    attention_map = scores.softmax(-1)
    del scores
    return attention_map @ value


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    if x.dtype is torch.float16 and dtype is torch.float32:
        out: Tensor = torch.ops.aten._softmax(x, dim, True)  # no float32 copy of x first
        return out
    return torch.softmax(x, dim, dtype)


def mean(parts: Iterable[tuple[float, float]]) -> float:
    """Average of (weight, value) pairs."""
    parts = list(parts)
    return sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts)
