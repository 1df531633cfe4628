"""What torch itself counts on a U-Net, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from atedm.choices import Own
from atedm.costs.architectures import run_once
from atedm.patching.steps import step_position
from atedm.patching.survey import find_blocks
from atedm.schedule import is_prune_less

STAGES = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


@dataclass(frozen=True)
class Counted:
    """MACs of one call of a U-Net, as `torch.utils.flop_counter` counts them."""

    total: int
    #: By attention block, what pruning adds included.
    blocks: Mapping[str, int]
    #: By stage ("down_blocks.1", "mid_block", ...), all of it.
    stages: Mapping[str, int]
    #: By stage, the residual blocks.
    resnets: Mapping[str, int]

    @property
    def rest(self) -> int:
        """All but the attention blocks."""
        return self.total - sum(self.blocks.values())


EARLY, LATE = 999, 0
"""Timesteps of the first and the last step of a run, which the patch tells apart by value."""


def kinds_of_step(schedule: str | Own, prune_less_share: float) -> dict[str, int]:
    """Map each kind of step that a run has, "normal_step" and "prune_less_step", to a timestep that is one."""
    kinds: dict[str, int] = {}
    for timestep in (EARLY, LATE, *range(EARLY, LATE, -27)):  # a schedule of one's own may have either anywhere
        less = is_prune_less(step_position(timestep).share, schedule, prune_less_share)
        kinds.setdefault("prune_less_step" if less else "normal_step", timestep)
    return kinds


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which does not know the CPU's fused attention before torch 2.15."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: _attention_flop})


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of fused attention, from shapes; torch hands over the other arguments as well."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def count_macs(unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int) -> Counted:
    """Let torch count one call. On the meta device nothing is computed, and the largest U-Net takes seconds.

    Args:
        unet: Patched or not, on any device.
        call: Its arguments but for the timestep, see `atedm.costs.architectures.Architecture.call`.
        timestep: Of 999 down to 0, which tells the early steps of a run from the late ones.
    """
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run_once(unet, call, timestep)
    by_module = {
        name.partition(".")[2]: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()
    }
    stages = [f"{STAGES['down']}.{i}" for i in range(len(unet.down_blocks))]
    stages += [STAGES["mid"]] if unet.mid_block is not None else []
    stages += [f"{STAGES['up']}.{i}" for i in range(len(unet.up_blocks))]

    def resnets(stage: str) -> int:
        parent = unet.get_submodule(stage)
        return sum(by_module.get(f"{stage}.resnets.{i}", 0) for i in range(len(getattr(parent, "resnets", ()))))

    return Counted(
        total=counter.get_total_flops() // 2,
        blocks={name: by_module.get(name, 0) for name in find_blocks(unet)},
        stages={stage: by_module.get(stage, 0) for stage in stages},
        resnets={stage: resnets(stage) for stage in stages},
    )
