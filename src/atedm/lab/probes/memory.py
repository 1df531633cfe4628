"""Activation memory of a denoising step, dense and pruned (supplement D), traced on U-Nets without weights.

The paper's claim is about the average, not the peak, which the attention map keeps up. Torch's allocator does not give
back what later layers no longer need, so the average is estimated: on the meta device, where nothing is computed, every
tensor storage is followed from the operation that makes it to the end of its last reference. Each operation lasts as
long as a roofline of an A100 says, and averages are over that time.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from atedm.costs.architectures import architecture, run_once
from atedm.costs.counting import EARLY, LATE
from atedm.hosts.runs import step_position
from atedm.lab.methods.candidates import Candidate, Pruning
from atedm.lab.methods.peers import Merging
from atedm.lab.tables import markdown_table
from atedm.suits import suits
from atedm.words import check_name, check_whole

ASSUMPTION = (
    "activations of one U-Net call, every tensor freed at the moment its last reference goes; no allocator cache, "
    "no workspaces of kernels, no weights, inputs or other models"
)
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

    peak: int  #: Most bytes at one time.
    average: float  #: Bytes, averaged over the time the call takes.
    seconds: float  #: How long the call takes.


@dataclass(frozen=True)
class MemoryReport:
    """Activation memory of dense and pruned steps, and how many more jobs fit where it is pruned."""

    dense: Footprint
    normal_step: Footprint  #: A step that prunes every block the method names.
    early_step: Footprint  #: A step that spares some of them; as ``normal_step`` if the method has none.
    weights: int  #: Bytes of the U-Net's parameters.
    early_share: float  #: Share of the steps of a run that are early.
    attention: str  #: One of `ATTENTIONS`.
    assumption: str = ASSUMPTION

    @property
    def mean_average(self) -> float:
        """Bytes of a pruned run, averaged over its time."""
        early, normal = self.early_step, self.normal_step
        times = (self.early_share * early.seconds, (1 - self.early_share) * normal.seconds)
        return float(np.average((early.average, normal.average), weights=times))

    @property
    def more_jobs(self) -> float:
        """Share of jobs that fit in addition, activations alone. The paper's 49.2 % is such a ratio: 18.8 / 12.6."""
        return self.dense.average / self.mean_average - 1

    @property
    def more_jobs_with_weights(self) -> float:
        """Share of jobs that fit in addition if each brings its own copy of the U-Net's weights."""
        return (self.dense.average + self.weights) / (self.mean_average + self.weights) - 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, memory in bytes."""
        derived = ("mean_average", "more_jobs", "more_jobs_with_weights")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def text(self) -> str:
        """Show a row a kind of step, and how many more jobs fit."""
        steps = {"dense": self.dense, "normal step": self.normal_step, "early step": self.early_step}
        rows = [[name, f"{step.peak / 2**20:.1f}", f"{step.average / 2**20:.1f}"] for name, step in steps.items()]
        return (
            f"{markdown_table(['activations, MiB', 'peak', 'average over the step'], rows)}\n\n"
            f"weights {self.weights / 2**20:.0f} MiB. More jobs in the same memory, over a run: {self.more_jobs:+.1%}; "
            f"each with its own weights {self.more_jobs_with_weights:+.1%}.\nAssumed: {self.assumption}."
        )


def memory(
    model: Any,
    candidate: Candidate,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    dtype: torch.dtype = torch.float16,
    attention: str = "fused",
) -> MemoryReport:
    """Say what activations take, dense and with a way to prune or ToMe, without weights (supplement D).

    ``model`` is as `atedm.costs.architectures.architecture` takes it; size in pixels and guidance are by default what
    suits it. ``attention`` is one of `ATTENTIONS`. Raises as `architecture` and `atedm.apply`, an `ImportError` if ToMe
    is asked for and ``tomesd`` is not installed, and a `ValueError` if an argument is out of its range.
    """
    if not isinstance(candidate, Pruning | Merging):
        raise ValueError(f"memory is traced of ways to prune and of ToMe, not of {candidate!r}")
    found = architecture(model)
    steps = suits(found.name).steps
    check_whole("batch", batch)
    images = batch * (2 if (found.guidance if guidance is None else guidance) else 1)
    call = found.call(size, images, dtype=dtype)
    unet = nn.Module.to(found.on_meta(), dtype)  # the method of torch, because that of diffusers warns of every cast
    footprint = partial(traced_footprint, unet, call, attention=attention)
    dense = footprint(LATE)
    kinds = {candidate.is_early(step_position(timestep).share): timestep for timestep in (EARLY, LATE)}
    with candidate.applied(SimpleNamespace(unet=unet)):
        by_kind = {kind: footprint(timestep) for kind, timestep in kinds.items()}
    early = sum(candidate.is_early(step / steps) for step in range(steps)) / steps
    some = next(iter(by_kind.values()))
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    return MemoryReport(dense, by_kind.get(False, some), by_kind.get(True, some), weights, early, attention)


def traced_footprint(
    unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int, *, attention: str = "fused"
) -> Footprint:
    """Sum up `traced_timeline`."""
    seconds, held = zip(*traced_timeline(unet, call, timestep, attention=attention), strict=True)
    return Footprint(max(held), float(np.average(held, weights=seconds)), sum(seconds))


def traced_timeline(
    unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int, *, attention: str = "fused"
) -> list[tuple[float, int]]:
    """Return (seconds, bytes held) of every operation that moves data in one ``call`` of ``unet``, patched or not.

    A patched U-Net tells by the ``timestep`` where in the run it is; ``attention`` is one of `ATTENTIONS`. Raises a
    `ValueError` if it is unknown, or ``unet`` is not on the meta device.
    """
    check_name("attention", attention, ATTENTIONS)
    if unet.device.type != "meta":
        raise ValueError(f"only a U-Net on the meta device can be traced, not one on {unet.device}")
    tracer = Tracer()
    with torch.no_grad(), _AsOnCuda(_fused if attention == "fused" else _plain), tracer:
        run_once(unet, call, timestep)
    return tracer.timeline


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, notes in ``timeline`` (seconds, bytes held) of each operation on the meta device that moves data.

    Held are storages, not tensors, so that views count once. A storage is new if no argument of the operation has it;
    what was there before, such as weights, is never new. The references are weak, and end when the storage does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.timeline: list[tuple[float, int]] = []
        self._held: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        ways = {functional.scaled_dot_product_attention: self._attend, torch.softmax: _softmax}
        return ways.get(func, func)(*args, **(kwargs or {}))


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, False)[0]  # type: ignore[no-any-return]


def _plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    scores = query @ key.mT  # the factor on it is part of the product
    if attn_mask is not None:
        scores = scores + attn_mask
    attention_map = scores.softmax(-1)
    del scores
    return attention_map @ value


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    if x.dtype is torch.float16 and dtype is torch.float32:
        return torch.ops.aten._softmax(x, dim, True)  # type: ignore[no-any-return]  # no float32 copy of x first
    return torch.softmax(x, dim, dtype)
