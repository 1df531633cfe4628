"""Set the rate of a method, by itself or by what a run may cost, and compare methods at equal cost.

Cost is the share of the dense model's multiply-accumulates over the run.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from atedm.app.models import native_size
from atedm.app.request import Request
from atedm.costs.budget import CostOutOfReach, fit_to_budget, run_cost
from atedm.hosts.models import find_model, is_transformer, spans_of
from atedm.hosts.unet_spans import choose_spans
from atedm.method.contract import Method
from atedm.method.matched import Matched
from atedm.method.presets import method_named
from atedm.plans.plan import Plan


def method_at(name: str, rate: float | None = None, *, transformer: bool = False) -> Method:
    """Return the method called ``name`` for U-Nets or for transformers, at another pruning rate if one is given."""
    method = method_named(name, transformer=transformer)
    return method if rate is None else replace(method, rate=rate)  # type: ignore[type-var]


def image_size(pipe: Any, request: Request) -> tuple[int, int]:
    """Return (width, height) in pixels of the images of a request."""
    width, height = native_size(pipe)
    return (request.width or width, request.height or height)


def request_cost(pipe: Any, request: Request, method: Method | None = None) -> float:
    """Return what a run costs by the method of the request, or by another one."""
    return run_cost(pipe, method or request.method, size=image_size(pipe, request), steps=request.steps)


def plan_cost(pipe: Any, request: Request, plan: Plan) -> float:
    """Return what a run by a plan costs: as it says, or as it is counted where it was written by hand.

    Steps that are forecast or by DeepCache then count as nothing.
    """
    if "cost" in plan.found:
        return float(plan.found["cost"])
    whole = len(plan.full_steps()) / int(plan.found.get("dense_steps", plan.steps))
    if plan.method is None:
        return whole
    return whole * run_cost(pipe, plan.method, size=image_size(pipe, request), steps=plan.steps)


def within_budget(pipe: Any, request: Request, budget: float) -> Request:
    """Return ``request`` with the least rate at which its run costs ``budget``, or raise a `ValueError`."""
    size = image_size(pipe, request)
    return replace(request, method=fit_to_budget(pipe, request.method, share=budget, size=size, steps=request.steps))


def with_other_method(pipe: Any, request: Request, name: str | None = None) -> Request:
    """Return ``request`` with another method to show beside it, at the same cost if it gets there.

    By default that is "paper" beside our own and "matched" beside all others, or none where it finds nothing to prune.
    Raises a `TypeError` if the pipeline has no model that can be pruned, and a `ValueError` if the name is unknown, or
    the method of that name finds nothing to prune.
    """
    name_or_default = name or ("paper" if isinstance(request.method, Matched) else "matched")
    other = method_named(name_or_default, transformer=has_transformer(pipe))
    if name is None and not can_prune(pipe, other):
        return request
    with suppress(CostOutOfReach):
        other = within_budget(pipe, replace(request, method=other), request_cost(pipe, request)).method
    return replace(request, other=other)


def has_transformer(pipe: Any) -> bool:
    """Whether what is pruned in a pipeline is a transformer."""
    return is_transformer(find_model(pipe))


def can_prune(pipe: Any, method: Method) -> bool:
    """Whether a method finds anything to prune in a model: AT-EDM needs blocks of two layers or more."""
    try:
        return bool(choose_spans(spans_of(find_model(pipe)), method))
    except ValueError:
        return False
