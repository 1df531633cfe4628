"""From a budget for a whole U-Net step to a pruning config."""

from __future__ import annotations

from typing import Any

from atedm.config import PruningConfig, check_name
from atedm.costs.architectures import architecture
from atedm.costs.budget import solve_pruning_rate, solve_tome_ratio
from atedm.costs.counting import count_macs
from atedm.costs.formula import CONVENTIONS, Macs, block_macs
from atedm.costs.tome import ToMe
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
        TypeError: If there is no U-Net.
        ValueError: If not just one of ``share`` and ``tmacs`` is given, or the budget cannot be kept; the message names
            the floor.
    """
    check_name("convention", convention, CONVENTIONS)
    if (share is None) == (tmacs is None):
        raise ValueError("give a budget as a share of the dense cost, or in T MACs: one of the two")
    given = tmacs if share is None else share
    if not isinstance(given, int | float) or isinstance(given, bool) or not given > 0:
        raise ValueError(f"a budget must be a number above 0, not {given!r}")
    arch = architecture(model)
    unet = arch.on_meta()
    latents = arch.latents(size)
    shapes = [block_shape(unet, place, latents, arch.words) for place, _ in find_blocks(unet).values()]
    rest = count_macs(unet, arch.call(size), 0).rest
    dense = rest + Macs().plus(*map(block_macs, shapes)).by(convention)
    images = 2 if (arch.guidance if guidance is None else guidance) else 1
    target = share * dense if share is not None else given * 1e12 / images
    if isinstance(method, ToMe):
        return solve_tome_ratio(shapes, method, target, steps, convention=convention, rest=rest, images=images)
    chosen = frozenset(choose_blocks(find_blocks(unet), method))
    return solve_pruning_rate(
        shapes, method, chosen, target, steps, of=of, convention=convention, rest=rest, images=images
    )
