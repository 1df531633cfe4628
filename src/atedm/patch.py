"""Switch pruning on and off in a pipeline or a model, and look on while it prunes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, overload

from atedm.costs.budget import fit_to_budget
from atedm.hosts.models import attach, detach, find_model, is_transformer
from atedm.hosts.state import Observation, is_attached, refuse_attached
from atedm.method.contract import Method
from atedm.method.presets import DEFAULT, method_named
from atedm.method.protection import region
from atedm.plans.applied import PlanSummary, apply_plan, as_plan, is_planned, remove_plan
from atedm.plans.plan import Plan
from atedm.summary import PatchSummary


@overload
def apply(
    target: Any, method: Method | str | None = None, *, budget: float | None = None, protect: Any = None
) -> PatchSummary: ...


@overload
def apply(target: Any, method: Plan | PathLike[str], *, protect: Any = None) -> PlanSummary: ...


def apply(
    target: Any,
    method: Method | Plan | PathLike[str] | str | None = None,
    *,
    budget: float | None = None,
    protect: Any = None,
) -> PatchSummary:
    """Make a diffusers pipeline prune tokens while it denoises. No weights change and no image is made.

        pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        print(atedm.apply(pipe))
        image = pipe("a butterfly above a rose").images[0]
        atedm.remove(pipe)

    Args:
        target: A pipeline with a `UNet2DConditionModel` or a transformer of `atedm.hosts.dit_families`, or such a
            model, compiled or not. A ControlNet is pruned only if it is given itself: ``apply(pipe.controlnet)``.
        method: A `Matched` or an `AtEdm`, or the name of one: our own "matched", or the paper's "paper", "dagger" (no
            pruning at the second level) and "turbo" (for few steps). By default "matched", which the figures support.
            Or a plan that `atedm tune` found: a `Plan`, or the path of a ``plan.json``. It sets the scheduler and the
            cache too, and the summary says how many steps to ask for.
        budget: What a run may cost, as a share of the dense run, at the size the model was trained for; its rate takes
            the place of the method's. `atedm.costs.budget.fit_to_budget` has more choices.
        protect: A mask over the image of what is never dropped, as `atedm.method.protection.region` reads it. That many
            of the others are dropped in its place; where they are too few, the first step says so.

    Returns:
        What was patched; printing it shows every block, the tokens it keeps, and what a run costs.

    Raises:
        TypeError: If there is no such model, ``method`` is none, a block is of a class not known here, or
            diffusers has changed what the patch takes over.
        ValueError: If there is nothing to prune, the model is patched already, a name is unknown, the budget cannot be
            kept, or the model is set up in a way pruning cannot honour. Nothing has been changed then.
    """
    mask = None if protect is None else region(protect)
    if (plan := as_plan(method)) is not None:
        if budget is not None:
            raise ValueError("a plan keeps to the budget it was found for; leave budget out")
        return apply_plan(target, plan, mask)
    model = find_model(target)
    method = DEFAULT if method is None else method
    method = method_named(method, transformer=is_transformer(model)) if isinstance(method, str) else method
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(f"method must be a Matched, an AtEdm or a name such as 'matched', not {method!r}")
    refuse_attached(model)
    if budget is not None:
        method = fit_to_budget(target, method, share=budget)
    attach(model, method, mask, target)
    return PatchSummary.of(target, method, frozenset(model._atedm.spans))


def remove(target: Any) -> None:
    """Undo `apply`: the model is exactly as before.

    Raises:
        TypeError: If there is no model that can be pruned.
        ValueError: If it is not patched.
        RuntimeError: If another thread is in the middle of a step of it.
    """
    model = find_model(target)
    remove_plan(model) if is_planned(model) else detach(model)


@contextmanager
def pruned(
    target: Any,
    method: Method | Plan | PathLike[str] | str | None = None,
    *,
    budget: float | None = None,
    protect: Any = None,
) -> Iterator[PatchSummary]:
    """Apply for the length of a ``with`` block, and remove even if it raises."""
    model = find_model(target)
    summary = apply(target, method, budget=budget, protect=protect)  # type: ignore[arg-type]
    try:
        yield summary
    finally:
        remove(model)


@contextmanager
def observed(target: Any, observer: Callable[[Observation], None]) -> Iterator[None]:
    """Call ``observer`` whenever tokens are dropped, with their importance and which were kept.

    The tensors are the ones in use: copy what is to be kept. Not for compiled models.

    Raises:
        TypeError: If there is no U-Net.
        ValueError: If it is not patched.
    """
    model = find_model(target)
    if not is_attached(model):
        raise ValueError("this model is not patched, so there is nothing to observe; call atedm.apply(...) first")
    observers = model._atedm.observers
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def is_applied(target: Any) -> bool:
    """Whether the model of ``target`` is patched.

    Raises:
        TypeError: If there is no model that can be pruned.
    """
    model = find_model(target)
    return is_attached(model) or is_planned(model)
