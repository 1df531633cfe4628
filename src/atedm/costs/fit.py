"""From a budget for a whole U-Net step to a pruning config."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel

from atedm.checks import is_whole
from atedm.choices import check_name
from atedm.config import PruningConfig
from atedm.costs.architectures import Architecture, architecture
from atedm.costs.budget import solve_pruning_rate, solve_tome_ratio
from atedm.costs.counting import count_macs
from atedm.costs.formula import CONVENTIONS, BlockShape, Macs, block_macs, mean_macs
from atedm.costs.tome import ToMe, tome_mean_macs
from atedm.patching.summary import block_shape
from atedm.patching.survey import choose_blocks, find_blocks


def fit_to_budget(
    model: Any,
    method: PruningConfig | ToMe,
    *,
    share: float | None = None,
    tmacs: float | None = None,
    size: tuple[int, int] | None = None,
    guidance: bool | None = None,
    of: str = "mean",
    steps: int = 50,
    convention: str = "exact",
) -> PruningConfig | ToMe:
    """Return ``method`` with the least pruning rate, or ratio of ToMe, that keeps to a budget.

    Args:
        model: As `atedm.cost`.
        method: What to prune and how, but for the rate.
        share: The budget as a share of the dense step.
        tmacs: Or in T MACs for one image, guidance counted.
        size: (width, height) in pixels; by default what the model was trained for.
        guidance: Whether an image takes two halves of a U-Net call; by default what suits the model.
        of: What the budget is for: the "mean" step of a run, or a "normal-step".
        steps: Steps of the run.
        convention: "exact", overheads counted, or "paper".

    Raises:
        TypeError: If there is no U-Net, or ``method`` is neither.
        ValueError: If ``size`` or ``steps`` is none, not just one of ``share`` and ``tmacs`` is given, or the budget
            cannot be kept; the message names the floor.
    """
    check_name("convention", convention, CONVENTIONS)
    if (share is None) == (tmacs is None):
        raise ValueError("give a budget as a share of the dense cost, or in T MACs: one of the two")
    given = tmacs if share is None else share
    if not isinstance(given, int | float) or isinstance(given, bool) or not given > 0:
        raise ValueError(f"a budget must be a number above 0, not {given!r}")
    if not isinstance(method, PruningConfig | ToMe):
        raise TypeError(f"a rate is solved for in a PruningConfig, the name of a preset or ToMe, not in {method!r}")
    if not is_whole(steps) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
    arch = architecture(model)
    profile = profile_of(arch, size)
    images = 2 if (arch.guidance if guidance is None else guidance) else 1
    dense = profile.rest + Macs().plus(*map(block_macs, profile.shapes)).by(convention)
    target = share * dense if share is not None else given * 1e12 / images
    if isinstance(method, ToMe):
        return solve_tome_ratio(
            profile.shapes, method, target, steps, convention=convention, rest=profile.rest, images=images
        )
    return solve_pruning_rate(
        profile.shapes,
        method,
        profile.pruned_by(method),
        target,
        steps,
        of=of,
        convention=convention,
        rest=profile.rest,
        images=images,
    )


def mean_share(
    model: Any, method: PruningConfig | ToMe, *, size: tuple[int, int] | None = None, steps: int = 50
) -> float:
    """Return the mean step of a run as a share of the dense step, exact, by formula.

    Args:
        model: As `atedm.cost`.
        method: What is pruned or merged.
        size: (width, height) in pixels; by default what the model was trained for.
        steps: Steps of the run.

    Raises:
        FileNotFoundError: As `atedm.cost`.
        TypeError: As `atedm.cost`.
        ValueError: As `atedm.cost`.
    """
    profile = profile_of(architecture(model), size)
    dense = profile.rest + Macs().plus(*map(block_macs, profile.shapes)).exact
    if isinstance(method, ToMe):
        return (profile.rest + tome_mean_macs(profile.shapes, method, steps)) / dense
    return (profile.rest + mean_macs(profile.shapes, method, profile.pruned_by(method), steps)) / dense


@dataclass(frozen=True)
class Profile:
    """What the cost of a U-Net at one size depends on, for one image."""

    unet: UNet2DConditionModel
    shapes: tuple[BlockShape, ...]
    #: MACs outside the attention blocks.
    rest: int

    def pruned_by(self, config: PruningConfig) -> frozenset[str]:
        """Names of the blocks that ``config`` prunes."""
        return frozenset(choose_blocks(find_blocks(self.unet), config))


def profile_of(arch: Architecture, size: tuple[int, int] | None = None) -> Profile:
    """Count the dense U-Net at ``size`` (width, height) in pixels; the same one is counted once."""
    return _profile(json.dumps(arch.config, sort_keys=True, default=str), arch.latents(size), arch.words)


@functools.lru_cache(maxsize=8)
def _profile(config: str, latents: tuple[int, int], words: int) -> Profile:
    arch = Architecture("", json.loads(config), (latents[1], latents[0]), 1, False, words)
    unet = arch.on_meta()
    shapes = tuple(block_shape(unet, place, latents, words) for place, _ in find_blocks(unet).values())
    return Profile(unet, shapes, count_macs(unet, arch.call(), 0).rest)
