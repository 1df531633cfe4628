"""What torch itself counts on a U-Net, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusers import UNet2DConditionModel

from atedm.costs.architectures import Architecture, run_once
from atedm.costs.flops import macs_by_module
from atedm.hosts.runs import step_position
from atedm.hosts.unet_spans import find_spans
from atedm.method.contract import Method

EARLY, LATE = 999, 0
"""Timesteps of the first and the last step of a run, which a pruned model tells apart by value."""


class StageCost(NamedTuple):
    """MACs of one stage of a U-Net, or list of blocks of a transformer, outside of the spans."""

    name: str
    resnet: int
    #: Resampling; for "in and out" the first and last convolution and the embeddings of time and text.
    other: int


@dataclass(frozen=True)
class Counted:
    """MACs of one call of a U-Net, as `torch.utils.flop_counter` counts them."""

    total: int
    #: By span, what pruning adds included.
    spans: Mapping[str, int]
    #: By stage ("down_blocks.1", "mid_block", ...), all of it.
    stages: Mapping[str, int]
    #: By stage, the residual blocks.
    resnets: Mapping[str, int]

    @property
    def rest(self) -> int:
        """All but the spans."""
        return self.total - sum(self.spans.values())

    def outside_spans(self) -> tuple[StageCost, ...]:
        """Split `rest` up by stage; what is in no stage comes last, as "in and out"."""
        found = []
        for stage, whole in self.stages.items():
            spans = sum(macs for name, macs in self.spans.items() if name.startswith(f"{stage}."))
            found.append(StageCost(stage, self.resnets[stage], whole - self.resnets[stage] - spans))
        return (*found, StageCost("in and out", 0, self.total - sum(self.stages.values())))


def kinds_of_step(method: Method) -> dict[str, int]:
    """Map each kind of step that a run has, "normal_step" and "early_step", to a timestep that is one."""
    kinds: dict[str, int] = {}
    for timestep in range(EARLY, LATE - 1, -27):  # a schedule of one's own may have either anywhere
        early = method.is_early(step_position(timestep).share)
        kinds.setdefault("early_step" if early else "normal_step", timestep)
    return kinds


def count_macs(unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int = LATE) -> Counted:
    """Let torch count one call.

    Args:
        unet: Pruned or not, on any device.
        call: Its arguments but for the timestep, see `atedm.costs.architectures.Architecture.call`.
        timestep: Of 999 down to 0, which tells the early steps of a run from the late ones.
    """
    total, by_module = macs_by_module(lambda: run_once(unet, call, timestep))
    sides = [("down_blocks", len(unet.down_blocks)), ("up_blocks", len(unet.up_blocks))]
    down, up = ([f"{side}.{i}" for i in range(count)] for side, count in sides)
    stages = [*down, *([] if unet.mid_block is None else ["mid_block"]), *up]

    def resnets(stage: str) -> int:
        return sum(macs for name, macs in by_module.items() if name.rpartition(".")[0] == f"{stage}.resnets")

    return Counted(
        total=total,
        spans={name: by_module[name] for name in find_spans(unet)},
        stages={stage: by_module[stage] for stage in stages},
        resnets={stage: resnets(stage) for stage in stages},
    )


def count_dense(arch: Architecture, size: tuple[int, int] | None = None) -> Counted:
    """Count one call of an unpruned U-Net at ``size`` (width, height) in pixels."""
    return count_macs(arch.on_meta(), arch.call(size))
