"""Activation memory of a denoising step, dense and pruned (supplement D).

The paper's claim is about the average, not the peak, which the attention map keeps up; and the average is estimated,
because torch's allocator does not give back what later layers no longer need. Here it is traced on U-Nets without
weights, with that assumption named, or measured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atedm.choices import Own
from atedm.config import PruningConfig, preset
from atedm.costs.architectures import architecture
from atedm.costs.counting import LATE, kinds_of_step
from atedm.costs.formula import at_most
from atedm.costs.memory_measured import measured_footprint
from atedm.costs.memory_traced import Footprint, gib, mean, traced_footprint
from atedm.costs.random_weights import random_unet
from atedm.costs.tome import ToMe
from atedm.costs.tomesd_patch import with_tomesd
from atedm.patching.apply import pruned
from atedm.schedule import prune_less_steps

ASSUMPTION = (
    "activations of one U-Net call, every tensor freed at the moment its last reference goes; no allocator cache, "
    "no workspaces of kernels, no weights, inputs or other models"
)


@dataclass(frozen=True)
class MemoryReport:
    """Activation memory of dense and pruned steps, and how many more jobs fit where it is pruned."""

    dense: Footprint
    #: A step that prunes every block the config names.
    normal_step: Footprint
    #: A step that leaves some of them alone; as ``normal_step`` if the schedule has none.
    prune_less_step: Footprint
    #: Bytes of the U-Net's parameters.
    weights: int
    #: Share of the steps of a run that are prune-less.
    prune_less_share: float
    #: One of `atedm.costs.memory_traced.ATTENTIONS`.
    attention: str
    assumption: str = ASSUMPTION

    @property
    def mean_average(self) -> float:
        """Bytes of a pruned run, averaged over its time."""
        parts = (
            (self.prune_less_share * self.prune_less_step.seconds, self.prune_less_step.average),
            ((1 - self.prune_less_share) * self.normal_step.seconds, self.normal_step.average),
        )
        return mean(parts)

    @property
    def more_jobs(self) -> float:
        """Share of jobs that fit in addition, activations alone. The paper's 49.2 % is such a ratio: 18.8 / 12.6."""
        return self.dense.average / self.mean_average - 1

    @property
    def more_jobs_with_weights(self) -> float:
        """Share of jobs that fit in addition if each brings its own copy of the U-Net's weights."""
        return (self.dense.average + self.weights) / (self.mean_average + self.weights) - 1

    @property
    def more_jobs_if_dense_keeps_all(self) -> float | None:
        """The same if the dense model, and it alone, gives nothing back; the paper's figures fit this reading."""
        if self.dense.unreleased is None:
            return None
        return (self.dense.unreleased + self.weights) / (self.mean_average + self.weights) - 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, memory in GiB."""
        keeping = self.more_jobs_if_dense_keeps_all
        return {
            "dense": self.dense.as_dict(),
            "normal_step": self.normal_step.as_dict(),
            "prune_less_step": self.prune_less_step.as_dict(),
            "mean_average_gib": gib(self.mean_average),
            "weights_gib": gib(self.weights),
            "prune_less_share": self.prune_less_share,
            "more_jobs": round(self.more_jobs, 4),
            "more_jobs_with_weights": round(self.more_jobs_with_weights, 4),
            "more_jobs_if_dense_keeps_all": None if keeping is None else round(keeping, 4),
            "attention": self.attention,
            "assumption": self.assumption,
        }


def memory(
    model: Any,
    method: PruningConfig | ToMe | str,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    steps: int = 50,
    dtype: torch.dtype = torch.float16,
    attention: str = "fused",
    device: str | None = None,
) -> MemoryReport:
    """Say what activations take, dense and pruned, without weights (supplement D).

    Args:
        model: As `architecture`.
        method: A `PruningConfig`, the name of a preset, or a `ToMe`, which needs the ``tomesd`` package. A
            ``tolerance`` is taken for never met.
        size: (width, height) in pixels; by default what the model was trained for.
        batch: Images drawn at once.
        guidance: Whether an image takes two halves of a U-Net call; by default what suits the model.
        steps: Steps of the run.
        dtype: Of weights and activations.
        attention: One of `atedm.costs.memory_traced.ATTENTIONS`. A device has its own.
        device: Where to measure, with random weights; by default nothing is computed, and the call is traced.

    Returns:
        A `MemoryReport`.

    Raises:
        FileNotFoundError: By `architecture`.
        ImportError: If ToMe is asked for and ``tomesd`` is not there.
        TypeError: By `architecture`, or by `atedm.apply` for blocks of a class not known here.
        ValueError: By those two, or if the size, ``batch``, ``steps`` or ``attention`` cannot be.
    """
    method = preset(method) if isinstance(method, str) else method
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    found = architecture(model)
    images = batch * (2 if (found.guidance if guidance is None else guidance) else 1)
    call = found.call(size, images, dtype=dtype, device=device or "meta")
    # The method of torch, because the one of diffusers warns of every cast.
    unet = random_unet(found, dtype, device) if device else nn.Module.to(found.on_meta(), dtype)

    def footprint(timestep: int) -> Footprint:
        if device:
            return measured_footprint(unet, call, timestep)
        return traced_footprint(unet, call, timestep, attention=attention)

    dense = footprint(LATE)
    patched: AbstractContextManager[Any]
    schedule: str | Own
    if isinstance(method, ToMe):
        schedule, patched = "prune-less-early", with_tomesd(unet, method)
    else:
        schedule = method.schedule
        patched = pruned(unet, at_most(method))
    with patched:
        kinds = kinds_of_step(schedule, method.prune_less_share)
        found_by_kind = {kind: footprint(timestep) for kind, timestep in kinds.items()}
    some = next(iter(found_by_kind.values()))
    normal, less = found_by_kind.get("normal_step", some), found_by_kind.get("prune_less_step", some)
    share = prune_less_steps(steps, schedule, method.prune_less_share) / steps
    return MemoryReport(
        dense=dense,
        normal_step=normal,
        prune_less_step=less,
        weights=sum(parameter.nbytes for parameter in unet.parameters()),
        prune_less_share=share,
        attention="the device's own" if device else attention,
    )
