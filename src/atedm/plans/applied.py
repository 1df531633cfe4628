"""Put a plan on a pipeline, and take it off again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atedm.hosts.models import attach, detach, find_model, is_transformer, spans_of
from atedm.hosts.state import refuse_attached
from atedm.method.contract import Method
from atedm.method.matched import Matched
from atedm.plans.caching import deep_cached
from atedm.plans.fingerprint import checksum, refuse_other_model
from atedm.plans.fitted import read_correction, with_correction
from atedm.plans.forecasting import forecast
from atedm.plans.plan import Plan, read_plan
from atedm.plans.schedulers import scheduled
from atedm.summary import PatchSummary

ADAPTER = "atedm_plan"
"""Name of the adapter that a plan's LoRA becomes."""


class _Applied:
    """What undoes a plan; it sits on the model. A copy of a model, pickled or not, has nothing to undo."""

    def __init__(self, undo: ExitStack | None = None) -> None:
        self.undo = undo

    def __reduce__(self) -> tuple[type[_Applied], tuple[()]]:
        return _Applied, ()


@dataclass(frozen=True)
class PlanSummary(PatchSummary):
    """What `atedm.apply` did by a plan. Where that prunes nothing, ``method`` is `Matched(rate=0)`, which keeps all."""

    plan: Plan

    def __str__(self) -> str:
        """Show the blocks, and what is left to the caller."""
        plan, lines = self.plan, []
        if self.pruned:
            lines.append("".join(super().__str__().rpartition(" blocks are pruned.")[:2]))
        lines.append(f"By the plan: {plan.what()}.")
        asked = [f"num_inference_steps={plan.steps}"]
        if plan.guidance is not None:
            asked.append(f"guidance_scale={plan.guidance:g}")
        lines.append(f"Call the pipeline with {', '.join(asked)}.")
        if cost := plan.found.get("cost"):
            distance = plan.found.get("distance")
            from_dense = "" if distance is None else f", {distance:.1f} dB from the dense images"
            lines.append(f"Measured: {cost:.1%} of the dense arithmetic{from_dense}.")
        return "\n".join(lines)


def as_plan(value: object) -> Plan | None:
    """Return the plan that ``value`` is or names (a path, or a string that ends in ".json"), or None."""
    if isinstance(value, Plan):
        return value
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(".json")):
        return read_plan(Path(value))
    return None


def apply_plan(target: Any, plan: Plan, mask: Tensor | None = None) -> PlanSummary:
    """Set a pipeline up by a plan: method, cache, scheduler, and LoRA or fit. The steps are the caller's to ask for.

    Args:
        target: A pipeline; a U-Net or a transformer where the plan only prunes.
        plan: What to do.
        mask: (H, W) zeros and ones over the image: what is never dropped.

    Raises:
        FileNotFoundError: If the plan's LoRA or fit is not there.
        ImportError: If the plan needs a package that is missing.
        TypeError: If there is no such model, or the plan needs the pipeline of one.
        ValueError: If the plan is for another model, or cannot be applied to this one. Nothing has been changed then.
    """
    model = find_model(target)
    refuse_attached(model)
    if is_planned(model):
        raise ValueError("this model has a plan already; call atedm.remove(...) first, then apply the other one")
    refuse_other_model(plan.model, target)
    needs_pipe = [name for name in ("scheduler", "cache", "lora") if getattr(plan, name) is not None]
    if needs_pipe and getattr(target, part_of(model), None) is not model:
        raise TypeError(f"this plan has a {needs_pipe[0]}, which is set on a whole pipeline, not compiled: give that")
    with ExitStack() as undo:
        if plan.lora_folder is not None:
            _load_lora(target, plan, undo)
        undo.enter_context(scheduled(target, plan.scheduler))
        if plan.method is not None:
            attach(model, _fitted(plan, model), mask, target)
            undo.callback(detach, model)
        if plan.cache is not None:
            branch = plan.cache.branch
            if branch is not None and is_transformer(model):
                raise ValueError("DeepCache is for U-Nets, and this pipeline has a transformer")
            undo.enter_context(
                forecast(target, plan.full_steps) if branch is None else deep_cached(target, plan.full_steps, branch)
            )
        method = Matched(rate=0.0) if plan.method is None else plan.method
        pruned = frozenset() if plan.method is None else frozenset(model._atedm.spans)
        summary = PlanSummary(**vars(PatchSummary.of(target, method, pruned)), plan=plan)
        model._atedm_plan = _Applied(undo.pop_all())
    return summary


def part_of(model: nn.Module) -> str:
    """Name the part of a pipeline that a model is: "unet" or "transformer"."""
    return "transformer" if is_transformer(model) else "unet"


def is_planned(model: nn.Module) -> bool:
    """Whether a plan is applied to a model."""
    applied: _Applied | None = vars(model).get("_atedm_plan")
    return applied is not None and applied.undo is not None


def remove_plan(model: nn.Module) -> None:
    """Undo `apply_plan`.

    Raises:
        KeyError: If there is no plan.
        RuntimeError: If another thread is in the middle of a step of the model.
    """
    if (state := vars(model).get("_atedm")) is not None:
        state.caller.refuse_others()
    applied: _Applied = vars(model).pop("_atedm_plan")
    if applied.undo is not None:
        applied.undo.close()


def _fitted(plan: Plan, model: Any) -> Method:
    """Return the plan's method with its fitted refill, if it has one."""
    assert plan.method is not None
    if plan.fit_file is None:
        return plan.method
    correction = read_correction(plan.fit_file, spans_of(model))
    _refuse_other_weights(plan, model, "fitted refill", "fit")
    return with_correction(plan.method, correction.to(model.device, model.dtype))


def _refuse_other_weights(plan: Plan, model: nn.Module, what: str, command: str) -> None:
    weights = plan.found.get("weights")
    if weights is not None and weights != checksum(model):
        raise ValueError(
            f"the {what} of this plan was found for other weights, or for these in another dtype; open the model in "
            f"that dtype, or find one for these by `atedm {command}`"
        )


def _load_lora(pipe: Any, plan: Plan, undo: ExitStack) -> None:
    folder = plan.lora_folder
    assert folder is not None
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"the LoRA of this plan is not at {str(folder)!r}; train it by `atedm finetune`")
    model = find_model(pipe)
    _refuse_other_weights(plan, model, "LoRA", "finetune")
    if getattr(model, "peft_config", None):
        raise ValueError(
            "this pipeline has LoRAs of its own beside which the plan's was not trained; unload them first"
        )
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in _linear(model)}
    undo.callback(_restore, model, before)
    try:
        # Into the weights: beside them it would be computed in every step.
        pipe.load_lora_weights(folder, adapter_name=ADAPTER)
        pipe.fuse_lora(components=[part_of(model)])
    except Exception as error:  # diffusers and peft raise many kinds
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the LoRA at {str(folder)!r}: {line}") from error
    finally:
        if getattr(model, "peft_config", None):
            pipe.unload_lora_weights()


def _linear(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a LoRA may change."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module.weight


@torch.no_grad()
def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, parameter in _linear(model):
        parameter.copy_(before[name])
