"""A plan on a MODEL of ComfyUI: its pruning and its forecast. Steps, sampler and LoRA are other nodes' work there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atedm.hosts.comfyui import begin_run, options_among, prune
from atedm.hosts.comfyui_runs import Run
from atedm.hosts.comfyui_unet import find_spans, is_unet
from atedm.plans.extrapolation import extrapolated
from atedm.plans.plan import Plan, refuse_difference

KEY = "atedm_forecast"
"""Names what a forecast lays on a model."""
SAMPLERS = {"dpm++": "dpmpp_2m", "unipc": "uni_pc"}
"""ComfyUI's names of the schedulers a plan may take."""


def apply_plan(model: Any, plan: Plan) -> Any:
    """Return a clone of a MODEL that does what a plan says. The model itself is not touched.

    Args:
        model: ComfyUI's ``ModelPatcher`` of a U-Net.
        plan: Found by `atedm tune`.

    Raises:
        ValueError: If the plan is for another model, or takes DeepCache; or as `atedm.hosts.comfyui.prune`.
    """
    _refuse_other_model(plan, model.get_model_object("diffusion_model"))
    if plan.cache is not None and plan.cache.branch is not None:
        raise ValueError(
            "this plan takes DeepCache, which this node does not have; `atedm tune` finds one without it where the "
            "package DeepCache is not installed"
        )
    clone = model.clone() if plan.method is None else prune(model, plan.method)
    if plan.cache is not None:
        clone.add_wrapper_with_key("outer_sample", KEY, _around_run())
        clone.add_wrapper_with_key("diffusion_model", KEY, _around_network(plan.full_steps))
    return clone


def advice(plan: Plan) -> str:
    """Say what a plan does, and what of it is left to other nodes."""
    lines = [plan.what()[:1].upper() + plan.what()[1:] + "."]
    sampler = "the sampler that the model is used with" if plan.scheduler is None else SAMPLERS[plan.scheduler]
    asked = [f"{plan.steps} steps", f"sampler: {sampler}"]
    asked.append("your own cfg, which the plan leaves open" if plan.guidance is None else f"cfg {plan.guidance:g}")
    lines.append(f"Set the sampler to {', '.join(asked)}.")
    if plan.lora is not None:
        lines.append(f"Load its LoRA before this node: {plan.lora_folder}.")
    if plan.fit is not None:
        lines.append("Its fitted refill is for diffusers; this node prunes without it.")
    if plan.size is not None:
        lines.append(f"Found at {plan.size[0]}×{plan.size[1]} pixels.")
    return "\n".join(lines)


def _refuse_other_model(plan: Plan, network: Any) -> None:
    if not is_unet(network):
        raise ValueError(
            f"this plan is for a U-Net ({plan.model.get('name', 'no name')}), and this is a {type(network).__name__}"
        )
    for name, here in (
        ("in_channels", network.in_channels),
        ("block_out_channels", [network.model_channels * factor for factor in network.channel_mult]),
        (
            "cross_attention_dim",
            next(module.attn2.to_k.weight.shape[1] for module in network.modules() if hasattr(module, "attn2")),
        ),
    ):
        refuse_difference(name, plan.model.get(name), here)
    layers = plan.model.get("transformer_layers_per_block")
    by_level = layers if isinstance(layers, list) else [layers] * len(network.channel_mult)
    depths = {span.place.level: span.place.layers for span in find_spans(network, 0)}
    planned = [by_level[level - 1] for level in sorted(depths) if level <= len(by_level)]
    refuse_difference("transformer_layers_per_block", planned, [depths[level] for level in sorted(depths)])


@dataclass
class _Forecast:
    """One run of a sampler, and the last two outputs of each condition."""

    run: Run
    given: dict[Hashable, list[tuple[int, Tensor]]] = field(default_factory=dict)


# Wrappers are plain functions: ComfyUI copies the options of a model deeply, and a function is not copied.


def _around_run() -> Any:
    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options, run = begin_run(executor, args, kwargs)
        options[KEY] = _Forecast(run)
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(KEY, None)

    return around


def _around_network(full: Callable[[int], Sequence[int]]) -> Any:
    """Leave the network out in steps that are not ``full``, if both halves of guidance are known from before."""

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = options_among((*args, *kwargs.values()))
        state: _Forecast | None = None if options is None else options.get(KEY)
        if options is None or state is None:
            return executor(*args, **kwargs)
        run = state.run
        run.begin_call(options)
        conditions = tuple(options.get("uuids") or options.get("cond_or_uncond") or (0,))
        given = [state.given.get(condition, []) for condition in conditions]
        shape = (args[0].shape[0] // len(conditions), *args[0].shape[2:])
        fits = all(past and (past[-1][1].shape[0], *past[-1][1].shape[2:]) == shape for past in given)
        if fits and not run.is_ambiguous and run.step not in full(max(len(run.sigmas) - 1, 1)):
            return torch.cat([extrapolated(past, run.step) for past in given])
        output: Tensor = executor(*args, **kwargs)
        for condition, part in zip(conditions, output.chunk(len(conditions)), strict=True):
            state.given[condition] = [*state.given.get(condition, []), (run.step, part.detach().clone())][-2:]
        return output

    return around
