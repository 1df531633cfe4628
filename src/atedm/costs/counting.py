"""What torch itself counts on a U-Net, part by part."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from atedm.costs.architectures import Architecture, run_once
from atedm.costs.flops import flop_counter
from atedm.hosts.runs import step_position
from atedm.hosts.unet_spans import find_spans
from atedm.method.contract import Method


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


EARLY, LATE = 999, 0
"""Timesteps of the first and the last step of a run, which a pruned model tells apart by value."""


def kinds_of_step(method: Method) -> dict[str, int]:
    """Map each kind of step that a run has, "normal_step" and "early_step", to a timestep that is one."""
    kinds: dict[str, int] = {}
    for timestep in (EARLY, LATE, *range(EARLY, LATE, -27)):  # a schedule of one's own may have either anywhere
        early = method.is_early(step_position(timestep).share)
        kinds.setdefault("early_step" if early else "normal_step", timestep)
    return kinds


def count_macs(unet: UNet2DConditionModel, call: Mapping[str, Any], timestep: int = LATE) -> Counted:
    """Let torch count one call. On the meta device nothing is computed, and the largest U-Net takes seconds.

    Args:
        unet: Pruned or not, on any device.
        call: Its arguments but for the timestep, see `atedm.costs.architectures.Architecture.call`.
        timestep: Of 999 down to 0, which tells the early steps of a run from the late ones.
    """
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run_once(unet, call, timestep)
    by_module = {
        name.partition(".")[2]: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()
    }
    stages = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    stages += ["mid_block"] if unet.mid_block is not None else []
    stages += [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]

    def resnets(stage: str) -> int:
        parent = unet.get_submodule(stage)
        return sum(by_module.get(f"{stage}.resnets.{i}", 0) for i in range(len(getattr(parent, "resnets", ()))))

    return Counted(
        total=counter.get_total_flops() // 2,
        spans={name: by_module.get(name, 0) for name in find_spans(unet)},
        stages={stage: by_module.get(stage, 0) for stage in stages},
        resnets={stage: resnets(stage) for stage in stages},
    )


def count_dense(arch: Architecture, size: tuple[int, int] | None = None) -> Counted:
    """Count one call of an unpruned U-Net at ``size`` (width, height) in pixels; the same one is counted once."""
    return _count_dense(json.dumps(arch.config, sort_keys=True, default=str), arch.latents(size), arch.words)


@functools.lru_cache(maxsize=32)
def _count_dense(config: str, latents: tuple[int, int], words: int) -> Counted:
    arch = Architecture("", json.loads(config), (latents[1], latents[0]), 1, False, words)
    return count_macs(arch.on_meta(), arch.call())
