"""A budget in place of a rate: which rate makes a step, or a run, cost so much."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from atedm.costs.architectures import Architecture, architecture
from atedm.costs.counting import StageCost, count_dense
from atedm.costs.macs import CONVENTIONS, SpanShape
from atedm.costs.spans import mean_macs, span_shape, step_macs
from atedm.costs.tome import ToMe
from atedm.costs.transformers import transformer_shapes
from atedm.hosts.models import spans_of
from atedm.hosts.unet_spans import choose_spans, find_spans
from atedm.method.contract import Method
from atedm.method.matched import DENSE_SHARES, Matched
from atedm.words import check_name, check_whole

#: What a budget is for: the mean step of a run, or a normal step, which is what the paper's figures are.
BUDGETS_OF = ("mean", "normal-step")

_HIGHEST_RATE = 1 - 1e-9

M = TypeVar("M", bound="Method | ToMe")


class CostOutOfReach(ValueError):
    """No rate or ratio brings a method down to the cost asked for."""


@dataclass(frozen=True)
class Profile:
    """What the cost of a model at one size depends on, for one image."""

    shapes: tuple[SpanShape, ...]
    #: What is outside the spans.
    stages: tuple[StageCost, ...]
    #: MACs of a dense step, as torch counts them.
    total: int

    @functools.cached_property
    def rest(self) -> int:
        """MACs outside the spans."""
        return sum(stage.resnet + stage.other for stage in self.stages)

    def dense(self, convention: str = "exact") -> float:
        """MACs of a dense step."""
        return self.rest + step_macs(self.shapes).by(convention)

    def mean(self, method: Method | ToMe, steps: int, convention: str = "exact") -> float:
        """Mean MACs of a step of a run with a method."""
        return self.rest + mean_macs(self.shapes, method, steps, convention)


def run_cost(model: Any, method: Method | ToMe, *, size: tuple[int, int] | None = None, steps: int = 50) -> float:
    """Return the cost of a run: its MACs as a share of the dense run's, everything counted.

    Args:
        model: As `atedm.costs.architectures.architecture`.
        method: What is pruned or merged.
        size: (width, height) in pixels; by default what the model was trained for.
        steps: Steps of the run.

    Raises:
        FileNotFoundError: As `architecture`.
        TypeError: As `architecture`.
        ValueError: As `architecture`.
    """
    profile = profile_of(architecture(model), size)
    return profile.mean(method, steps) / profile.dense()


def fit_to_budget(
    model: Any,
    method: M,
    *,
    share: float | None = None,
    tmacs: float | None = None,
    size: tuple[int, int] | None = None,
    guidance: bool | None = None,
    of: str = "mean",
    steps: int = 50,
    convention: str = "exact",
) -> M:
    """Return ``method`` with the least rate, or ratio of ToMe, that keeps to a budget for the whole model.

    Matched pruning whose run begins dense does so for a smaller share of it, where else no rate keeps to the budget.

        >>> from atedm import AtEdm
        >>> fit_to_budget("sdxl", AtEdm(), tmacs=4.1, of="normal-step", convention="paper").rate  # doctest: +SKIP
        0.617...

    Args:
        model: As `atedm.costs.architectures.architecture`.
        method: What to prune and how, but for the rate.
        share: The budget as a share of the dense step.
        tmacs: Or in T MACs for one image, guidance counted.
        size: (width, height) in pixels; by default what the model was trained for.
        guidance: Whether an image takes two halves of a U-Net call; by default what suits the model.
        of: One of `BUDGETS_OF`.
        steps: Steps of the run.
        convention: One of `CONVENTIONS`.

    Raises:
        TypeError: If there is no U-Net, or ``method`` has no rate.
        ValueError: If an argument is out of its range, or there is nothing to prune.
        CostOutOfReach: If the budget cannot be kept; the message names the range that can.
    """
    check_name("convention", convention, CONVENTIONS)
    check_name("of", of, BUDGETS_OF)
    check_whole("steps", steps)
    if (share is None) == (tmacs is None):
        raise ValueError("give a budget as a share of the dense cost, or in T MACs: one of the two")
    given = tmacs if share is None else share
    if not isinstance(given, int | float) or isinstance(given, bool) or not given > 0:
        raise ValueError(f"a budget must be a number above 0, not {given!r}")
    slider, highest, what = (
        ("ratio", 0.75, "a step with ToMe") if isinstance(method, ToMe) else ("rate", _HIGHEST_RATE, "")
    )
    if not hasattr(method, slider):
        raise TypeError(f"a budget is solved for the rate of a method or the ratio of ToMe, not for {method!r}")
    arch = architecture(model)
    profile = profile_of(arch, size)
    if not isinstance(method, ToMe):
        choose_spans(spans_of(arch.on_meta()), method)  # or the floor would be the dense cost, with no word why
    images = 2 if (arch.guidance if guidance is None else guidance) else 1
    target = share * profile.dense(convention) if share is not None else given * 1e12 / images

    def cost(value: float, method: M) -> float:
        at = dataclasses.replace(method, **{slider: value})  # type: ignore[type-var]
        if of == "mean":
            return profile.mean(at, steps, convention)
        return profile.rest + step_macs(profile.shapes, at).by(convention)

    what = what or ("a mean step" if of == "mean" else "a normal step")
    choices = with_fewer_dense_steps(method)
    method = next((one for one in choices if cost(highest, one) <= target), choices[-1])
    found = _least(functools.partial(cost, method=method), target, highest, what, images)
    return dataclasses.replace(method, **{slider: found})  # type: ignore[type-var]


def with_fewer_dense_steps(method: M) -> list[M]:
    """Return ``method``, and after it the same with fewer dense steps at the beginning of a run, if it has any."""
    if not isinstance(method, Matched):
        return [method]
    shares = (share for share in DENSE_SHARES if share < method.dense_share)
    return [method, *(dataclasses.replace(method, dense_share=share) for share in shares)]


def _least(cost: Callable[[float], float], target: float, highest: float, what: str, images: int) -> float:
    """Return the least x in [0, highest] with ``cost(x) <= target``; above 0, cost falls with x."""
    dense, floor = cost(0.0), cost(highest)
    if not floor <= target <= dense:
        asked, most, least = (images * macs / 1e12 for macs in (target, dense, floor))
        raise CostOutOfReach(
            f"{what} cannot cost {asked:.4g} T MACs, {target / dense:.1%} of the dense {most:.4g}; "
            f"pruning reaches down to {least:.4g}, {floor / dense:.1%}"
        )
    if target == dense:
        return 0.0
    return least_rate(lambda x: cost(x) <= target, highest, 60)


def least_rate(fits: Callable[[float], bool], highest: float, halvings: int) -> float:
    """Return the least x up to ``highest`` that ``fits``, as all larger ones do, rounded up to six digits."""
    low, high = 0.0, highest
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return min(math.ceil(high * 1e6) / 1e6, highest)  # finer than one token of a million


def profile_of(arch: Architecture, size: tuple[int, int] | None = None) -> Profile:
    """Count the dense model at ``size`` (width, height) in pixels; the same one is counted once."""
    grid = arch.grid(size) if arch.is_transformer else arch.latents(size)
    return _profile(json.dumps(arch.config, sort_keys=True, default=str), grid, arch.words)


@functools.lru_cache(maxsize=8)
def _profile(config: str, grid: tuple[int, int], words: int) -> Profile:
    arch = Architecture("", json.loads(config), (grid[1], grid[0]), 1, False, words)
    if arch.is_transformer:
        total, shapes, stages = transformer_shapes(arch.on_meta(), arch.config, grid, words)
        return Profile(shapes, stages, total)
    model, counted = arch.on_meta(), count_dense(arch)
    blocks = tuple(span_shape(model, place, grid, words) for place, _ in find_spans(model).values())
    return Profile(blocks, counted.outside_spans(), counted.total)
