"""The host for ComfyUI: prunes a clone of its MODEL through its own patch points.

Nothing of ComfyUI is imported, and no class or module of its is changed: the clone gets object patches and wrappers,
which ComfyUI lays over the model while the clone is in use and takes off for others. The state of a run lives in the
options that ComfyUI hands from the sampler down to every layer, so two clones of one model do not meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from atedm.hosts import comfyui_transformers, comfyui_unet
from atedm.hosts.comfyui_call import KEY, Call, Pruning, Span
from atedm.hosts.comfyui_runs import Run
from atedm.method.contract import Method

_RUN = "atedm_run"


def pruning_of(model: Any) -> Pruning | None:
    """What prunes a MODEL of ComfyUI; None if nothing does."""
    return model.get_attachment(KEY)  # type: ignore[no-any-return]


def prune(model: Any, method: Method) -> Any:
    """Return a clone of a MODEL that ``method`` prunes. The model itself is not touched.

    Args:
        model: ComfyUI's ``ModelPatcher`` of a U-Net (SD 1.5, SDXL) or a transformer (FLUX, SD3, Qwen-Image).
        method: What prunes.

    Raises:
        ValueError: If it is pruned already, is of an unknown kind, or has nothing to prune. Nothing is changed then.
    """
    if pruning_of(model) is not None:
        raise ValueError("this model is pruned already, by a node before this one; keep one of the two")
    clone = model.clone()
    pruning = Pruning(method)
    pruning.spans = tuple(_choose(_find_spans(clone, pruning), method))
    for span in pruning.spans:
        span.lay_on(clone)
    clone.set_attachments(KEY, pruning)
    clone.add_wrapper_with_key("outer_sample", KEY, _around_run(pruning))
    clone.add_wrapper_with_key("apply_model", KEY, _around_call(pruning))
    return clone


def _find_spans(model: Any, pruning: Pruning) -> list[Span]:
    network, method = model.get_model_object("diffusion_model"), pruning.method
    if comfyui_unet.is_unet(network):
        return list(comfyui_unet.find_spans(network, method.dense_layers))
    if not comfyui_transformers.is_transformer(network):
        raise ValueError(
            f"found a {type(network).__name__}; token pruning works on the U-Nets of SD 1.5, SD 2 and SDXL, on FLUX, "
            "SD3 and Qwen-Image, and on what is made of them"
        )
    if method.dense_layers:
        raise ValueError(
            f"{method.name} ranks tokens by the attention of U-Nets, and this is a {type(network).__name__}; the "
            "method 'matched' works here"
        )
    return list(comfyui_transformers.find_spans(network))


def _choose(spans: Iterable[Span], method: Method) -> list[Span]:
    """Return the spans in which ``method`` has something to prune, whatever its rate."""
    spans = list(spans)
    half: Method = replace(method, rate=0.5)  # type: ignore[type-var]
    chosen = [span for span in spans if half.count(span.place, 1024) < 1024]
    if not chosen:
        depth = max((span.place.layers for span in spans), default=0)
        raise ValueError(
            f"nothing to prune: the attention blocks of this model have {depth} layers at most, and {method.name} runs "
            f"{method.dense_layers} on all tokens; the method 'matched' works here"
        )
    return chosen


# Wrappers are plain functions: ComfyUI copies the options of a model deeply, and a function is not copied.


def _around_run(pruning: Pruning) -> Any:
    """Give every run of a sampler its own state, and take it away however the run ends."""

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options, run = begin_run(executor, args, kwargs)
        pruning.record.clear()
        options[_RUN] = run
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(_RUN, None)
            run.clear()

    return around


def begin_run(executor: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Run]:
    """Return the options that the sampler which ``executor`` runs will hand to every call, and the run that begins."""
    guider = executor.class_obj
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    run = Run.of(sigmas, guider.model_patcher.get_model_object("model_sampling"))
    return guider.model_options.setdefault("transformer_options", {}), run


def options_among(tables: Iterable[Any]) -> dict[str, Any] | None:
    """Find ComfyUI's ``transformer_options`` of a call among its arguments."""
    return next((t for t in tables if isinstance(t, dict) and "wrappers" in t and "sigmas" in t), None)


def _around_call(pruning: Pruning) -> Any:
    """Tell the spans where each call of the model stands."""

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        tables = [value for value in (*args, *kwargs.values()) if isinstance(value, dict)]
        options = options_among(tables)
        if options is None:
            return executor(*args, **kwargs)
        run = options.get(_RUN)
        if run is None:  # who calls a model without ComfyUI's sampler starts anew each time
            run = Run.of(options.get("sample_sigmas", ()))
        run.begin_call(options)
        signs = list(options.get("cond_or_uncond") or [0])
        call = Call(
            pruning,
            run,
            early=pruning.method.is_early(run.share),
            conditions=len(signs),
            wanted=signs.index(0) if 0 in signs else 0,
            latents=tuple(args[0].shape[-2:]),
        )
        control = next((table for table in tables if table is not options), None)
        for span in pruning.spans:
            span.begin_call(call, options, control)
        try:
            return executor(*args, **kwargs)
        finally:
            for span in pruning.spans:
                span.end_call()

    return around
