"""Activation memory of a denoising step, dense and pruned (supplement D).

The paper's claim is about the average, not the peak, which the attention map keeps up. The average is estimated,
because torch's allocator does not give back what later layers no longer need. Here it is traced on U-Nets without
weights, under that assumption.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from atedm.costs.architectures import architecture
from atedm.costs.counting import EARLY, LATE
from atedm.hosts.runs import step_position
from atedm.lab.methods.candidates import Candidate, Pruning
from atedm.lab.methods.peers import Merging
from atedm.lab.probes.memory_traced import Footprint, mean, traced_footprint
from atedm.suits import suits
from atedm.words import check_whole

ASSUMPTION = (
    "activations of one U-Net call, every tensor freed at the moment its last reference goes; no allocator cache, "
    "no workspaces of kernels, no weights, inputs or other models"
)


@dataclass(frozen=True)
class MemoryReport:
    """Activation memory of dense and pruned steps, and how many more jobs fit where it is pruned."""

    dense: Footprint
    #: A step that prunes every block the method names.
    normal_step: Footprint
    #: A step that spares some of them; as ``normal_step`` if the method has none.
    early_step: Footprint
    #: Bytes of the U-Net's parameters.
    weights: int
    #: Share of the steps of a run that are early.
    early_share: float
    #: One of `atedm.lab.probes.memory_traced.ATTENTIONS`.
    attention: str
    assumption: str = ASSUMPTION

    @property
    def mean_average(self) -> float:
        """Bytes of a pruned run, averaged over its time."""
        early, normal = self.early_step, self.normal_step
        times = (self.early_share * early.seconds, (1 - self.early_share) * normal.seconds)
        return mean(zip(times, (early.average, normal.average), strict=True))

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


def memory(
    model: Any,
    candidate: Candidate,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    steps: int | None = None,
    dtype: torch.dtype = torch.float16,
    attention: str = "fused",
) -> MemoryReport:
    """Say what activations take, dense and with a way to prune or ToMe, without weights (supplement D).

    ``model`` is as `atedm.costs.architectures.architecture` takes it; size in pixels, guidance and steps are by default
    what suits it. ``attention`` is one of `atedm.lab.probes.memory_traced.ATTENTIONS`.

    Raises:
        FileNotFoundError: By `architecture`.
        ImportError: If ToMe is asked for and ``tomesd`` is not installed.
        TypeError: By `architecture`, or by `atedm.apply`.
        ValueError: By those two, or if an argument is out of its range.
    """
    if not isinstance(candidate, Pruning | Merging):
        raise ValueError(f"memory is traced of ways to prune and of ToMe, not of {candidate!r}")
    found = architecture(model)
    steps = suits(found.name).steps if steps is None else steps
    check_whole("batch", batch)
    check_whole("steps", steps)
    images = batch * (2 if (found.guidance if guidance is None else guidance) else 1)
    call = found.call(size, images, dtype=dtype)
    unet = nn.Module.to(found.on_meta(), dtype)  # the method of torch, because that of diffusers warns of every cast

    def footprint(timestep: int) -> Footprint:
        return traced_footprint(unet, call, timestep, attention=attention)

    dense = footprint(LATE)
    kinds = {candidate.is_early(step_position(timestep).share): timestep for timestep in (EARLY, LATE)}
    with candidate.applied(SimpleNamespace(unet=unet)):
        by_kind = {kind: footprint(timestep) for kind, timestep in kinds.items()}
    early = sum(candidate.is_early(step / steps) for step in range(steps)) / steps
    some = next(iter(by_kind.values()))
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    return MemoryReport(dense, by_kind.get(False, some), by_kind.get(True, some), weights, early, attention)
