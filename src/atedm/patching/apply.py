"""Switch AT-EDM on and off in a pipeline or a U-Net."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from atedm.choices import draws_in_few_steps, own_name
from atedm.config import PruningConfig, preset
from atedm.patching.drift import refuse_drift
from atedm.patching.state import BlockObservation, BlockPatch, UNetState
from atedm.patching.steps import step_position
from atedm.patching.summary import PatchSummary
from atedm.patching.survey import (
    choose_blocks,
    find_blocks,
    find_unet,
    refuse_chunking,
    refuse_merging,
    refuse_perturbed,
)
from atedm.patching.threads import PATCHING, refuse_another_thread
from atedm.patching.transformer import PrunedTransformer2DModel
from atedm.protection import protected_tokens, region
from atedm.schedule import is_prune_less


def apply(
    target: Any,
    config: PruningConfig | str | None = None,
    *,
    budget: float | None = None,
    protect: Any = None,
) -> PatchSummary:
    """Make a diffusers pipeline prune tokens while it denoises. No weights change and no image is made.

        pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        print(atedm.apply(pipe))
        image = pipe("a red circle above a blue square").images[0]
        atedm.remove(pipe)

    Args:
        target: A pipeline with a `UNet2DConditionModel`, or such a U-Net, compiled or not. A `ControlNetModel` is
            pruned only if it is given itself: ``apply(pipe.controlnet)``.
        config: A `PruningConfig`, or the name of a preset: the paper's "paper", "dagger" and "turbo", or our own
            "matched" and "matched-deep". By default the one that `suiting_preset` names: "paper", or "turbo" for
            few-step models.
        budget: What the mean step of a run may cost, as a share of the dense step, at the size the model was trained
            for; its pruning rate takes the place of the config's. `atedm.PruningConfig.for_budget` has more choices.
        protect: A mask over the image of what is never dropped, as `atedm.protection.region` reads it. That many of
            the others are dropped in its place; where they are too few, the first step says so.

    Returns:
        What was patched; printing it shows every block, the tokens it keeps, and the share of the work that is saved.

    Raises:
        TypeError: If there is no such U-Net, an attention block is of a class not known here, or diffusers has changed
            what the patch takes over.
        ValueError: If there is nothing to prune, the U-Net is patched already, a name is unknown, the budget cannot be
            kept, or the model is set up in a way pruning cannot honour. Nothing has been changed then.
    """
    config = suiting_preset(target) if config is None else config
    config = preset(config) if isinstance(config, str) else config
    if not isinstance(config, PruningConfig):
        raise TypeError(f"config must be a PruningConfig or the name of a preset, not a {type(config).__name__}")
    mask = None if protect is None else region(protect)
    if mask is not None and len(config.gradual) > 1:
        raise ValueError("protect needs a whole grid of tokens, so it allows one pruning layer a block")
    unet = find_unet(target)
    refuse_drift()
    _refuse_applied(unet)
    if budget is not None:
        config = PruningConfig.for_budget(target, share=budget, config=config)
    blocks = find_blocks(unet)
    chosen = choose_blocks(blocks, config)
    state = UNetState(config, tuple(chosen), protect=mask)
    # A stage counts all its attention blocks, so First and Last do not depend on which of them are pruned.
    spared = config.spared(place for place, _ in blocks.values())
    summary = PatchSummary.of(unet, config, [place for place, _ in blocks.values()], frozenset(chosen), spared)
    with PATCHING:
        _refuse_applied(unet)  # another thread may have been quicker
        for name, (place, module) in chosen.items():
            module._atedm = BlockPatch(place, state, name in spared)
            module.__class__ = PrunedTransformer2DModel
        unet._atedm = state
        unet._atedm_hook = unet.register_forward_pre_hook(before_forward, with_kwargs=True)
    return summary


def _refuse_applied(unet: UNet2DConditionModel) -> None:
    if is_applied(unet):
        raise ValueError("this U-Net is patched already; call atedm.remove(...) first, then apply the other config")


def suiting_preset(target: Any) -> str:
    """Return the preset that suits a pipeline or U-Net by its name and scheduler.

    "turbo" for few-step models, whose steps are too few to tell early from late, which is logged once;
    else "paper".
    """
    unet = find_unet(target)
    names = [str(getattr(part.config, "_name_or_path", "")) for part in (target, unet) if hasattr(part, "config")]
    names.append(type(getattr(target, "scheduler", None)).__name__)
    few = next(filter(draws_in_few_steps, names), None)
    if few is None:
        return "paper"
    _say_once(f"{own_name(few)} draws in few steps, too few to tell early from late: preset 'turbo', not 'paper'")
    return "turbo"


_LOGGER = logging.getLogger("atedm")


@functools.cache
def _say_once(what: str) -> None:
    _LOGGER.warning(what)


def remove(target: Any) -> None:
    """Undo `apply`: the U-Net is exactly as before.

    Raises:
        TypeError: If there is no U-Net.
        ValueError: If it is not patched.
        RuntimeError: If another thread is in the middle of a step of it.
    """
    unet = find_unet(target)
    with PATCHING:
        if not is_applied(unet):
            raise ValueError("this U-Net is not patched, so there is nothing to remove")
        refuse_another_thread(unet, unet._atedm.caller)
        for module in unet.modules():
            if isinstance(module, PrunedTransformer2DModel):
                module.__class__ = Transformer2DModel
                del module._atedm
        unet._atedm_hook.remove()
        del unet._atedm_hook, unet._atedm


@contextmanager
def pruned(
    target: Any, config: PruningConfig | str | None = None, *, budget: float | None = None, protect: Any = None
) -> Iterator[PatchSummary]:
    """Apply for the length of a ``with`` block, and remove even if it raises."""
    unet = find_unet(target)
    summary = apply(target, config, budget=budget, protect=protect)
    try:
        yield summary
    finally:
        remove(unet)


@contextmanager
def observed(target: Any, observer: Callable[[BlockObservation], None]) -> Iterator[None]:
    """Call ``observer`` for every pruning layer that runs, with the importance and the kept tokens it found.

    The tensors are the ones in use: copy what is to be kept. Not for compiled models.

    Raises:
        TypeError: If there is no U-Net.
        ValueError: If it is not patched.
    """
    unet = find_unet(target)
    if not is_applied(unet):
        raise ValueError("this U-Net is not patched, so there is nothing to observe; call atedm.apply(...) first")
    observers = unet._atedm.observers
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def is_applied(target: Any) -> bool:
    """Whether the U-Net of ``target`` is patched.

    Raises:
        TypeError: If there is no U-Net.
    """
    return "_atedm" in vars(find_unet(target))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_forward(unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the blocks where the step stands, and refuse what cannot be honoured. A forward pre-hook of the U-Net.

    It is a plain function that finds its state on the module it is called with, so that copies of a patched U-Net,
    pickled or not, use their own. `torch.compile` must leave it alone, or it would compile it again at every step.
    """
    names = [*inspect.signature(type(unet).forward).parameters][1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    if "timestep" not in given:
        return  # the call fails at once, and diffusers says why
    if given.get("attention_mask") is not None:
        raise ValueError("attention_mask masks tokens by their place, which pruning changes; call atedm.remove first")
    if (given.get("cross_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
        raise ValueError(
            "ip_adapter_masks are laid over the tokens by their number, which pruning changes; "
            "call atedm.remove first, or leave the masks out"
        )
    state: UNetState = unet._atedm
    if state.config.guidance_masks == "shared":
        refuse_perturbed(unet)
    with PATCHING:
        refuse_another_thread(unet, state.caller)
        state.caller = threading.get_ident()
    position = step_position(given["timestep"])
    remembers = state.config.refresh_every > 1 or state.config.remembers_updates
    follows = remembers and state.run.follows(given["timestep"], position)
    for name in state.blocks:
        block = unet.get_submodule(name)
        refuse_chunking(name, block)
        refuse_merging(name, block)
        if remembers:
            block._atedm.memory.begin_step(follows, state.config.refresh_every)
    state.step = torch.tensor(position.step, device="cpu")
    state.prune_less = is_prune_less(position.share, state.config.schedule, state.config.prune_less_share)
    sample = given.get("sample")
    if state.protect is not None and isinstance(sample, Tensor):
        state.protect = state.protect.to(sample.device)
        _see_room(unet, state, (sample.shape[-2], sample.shape[-1]))


def check_protected(model: Any, size: tuple[int, int]) -> None:
    """See before any work that no block will keep fewer tokens than are protected.

    Args:
        model: A patched pipeline or U-Net, not in the midst of a run.
        size: (height, width) of the latents.

    Raises:
        ValueError: If one will; the message names a rate that leaves enough.
    """
    unet = find_unet(model)
    state: UNetState = unet._atedm
    if state.protect is not None:
        _see_room(unet, state, size)


def _see_room(unet: UNet2DConditionModel, state: UNetState, size: tuple[int, int]) -> None:
    """See that no block keeps fewer tokens than are protected, in any step that the schedule has."""
    if size in state.roomy:
        return
    assert state.protect is not None
    config = state.config
    kinds = {is_prune_less(i / 50, config.schedule, config.prune_less_share) for i in range(50)}
    lacking, most = "", 1.0  # the first block that lacks room, and what a rate may be multiplied by for all of them
    for name in state.blocks:
        patch: BlockPatch = unet.get_submodule(name)._atedm
        grid = tuple(-(-side // 2 ** (patch.place.level - 1)) for side in size)
        tokens = grid[0] * grid[1]
        protected = int(protected_tokens(state.protect, (grid[0], grid[1])).sum())
        for prune_less in kinds:
            if prune_less and patch.spared:
                continue
            left = min(config.tokens_left(patch.place, tokens, prune_less=prune_less).values(), default=tokens)
            if left < protected:
                lacking = (
                    lacking or f"{protected} of the {tokens} tokens of {name} are protected, and only {left} are kept"
                )
                # One layer prunes, because what protects needs a whole grid.
                rate = config.rates_in(patch.place, prune_less=prune_less)[0][1]
                most = min(most, (1 - protected / tokens) / rate)
    if lacking:
        asked = config.rates[0][1]
        what = "rate in gradual" if config.gradual else "pruning_rate"
        raise ValueError(f"{lacking}; protect less, or give a {what} of {math.floor(100 * most * asked) / 100}")
    state.roomy.add(size)
