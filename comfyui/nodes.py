"""What the nodes do, and what their inputs are, for both ways in which ComfyUI takes nodes."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atedm.hosts.comfyui import prune, pruning_of
from atedm.hosts.comfyui_kept import KeptInSpan
from atedm.hosts.comfyui_transformers import is_transformer
from atedm.method.at_edm import DAGGER, TURBO, AtEdm
from atedm.method.contract import Method
from atedm.method.early_strength import EarlyStrength
from atedm.method.matched import Matched
from atedm.method.presets import TRANSFORMER_METHODS
from atedm.plans.in_comfyui import advice, apply_plan
from atedm.plans.plan import read_plan

CATEGORY = "model_patches/token pruning"
METHODS: dict[str, Method] = {
    "matched": Matched(),
    "AT-EDM": AtEdm(),
    "AT-EDM† (spares the second level)": DAGGER,
    "AT-EDM for few steps": TURBO,
}
"""The methods by what the node calls them; the first is what the figures support."""


@dataclass(frozen=True)
class Number:
    """An input that is a number."""

    default: float
    least: float
    most: float
    step: float
    tooltip: str


METHOD_TOOLTIP = (
    "Matched pruning is closest to the unpruned image at every cost, and works on every model here. AT-EDM is the "
    "method of the paper (CVPR 2024); it is for SDXL, whose attention blocks have two layers or more."
)
RATE = Number(
    0.5, 0.0, 0.9, 0.01, "Share of the tokens that are dropped: the one slider. 0 changes nothing, more is cheaper."
)
EARLY = Number(
    1.0,
    0.0,
    1.0,
    0.05,
    "How much of the rate holds in the first 30 % of the steps, which lay out the image. 1 is all of it, 0 prunes "
    "nothing there: closer to the unpruned image, and dearer.",
)
BLOCK = Number(
    0, 0, 999, 1, "Which block, counted from 0 in the order they run. A number too large shows the last one."
)
STEP = Number(
    -1, -1, 9999, 1, "Which step, counted from 0; -1 shows the share of the steps in which each token stayed."
)

PRUNING_DESCRIPTION = (
    "Runs attention blocks on a part of the tokens of an image and refills the others, so that an image takes less "
    "time. Put it behind LoRA and other patches, right before the sampler."
)
_USUAL_CFG = 8.0
"""As ComfyUI's own samplers are set; for a plan that leaves it open."""
PLAN_DESCRIPTION = (
    "Does with a model what a plan.json says, which `atedm tune` found on that model: pruning, and steps whose output "
    "is forecast. Connect its steps and cfg to the sampler."
)
KEPT_DESCRIPTION = (
    "Shows which tokens the sampler that came before kept: bright ones stayed, dark ones were dropped and refilled."
)
PLAN_TOOLTIP = "Path of a plan.json, or its name in ComfyUI's input folder."
UNET_TOOLTIP = "The model that the plan was found on: SDXL, SD 1.5 or SD 2."
MODEL_TOOLTIP = "SDXL, SD 1.5, SD 2, FLUX, SD3 or Qwen-Image."
PRUNED_TOOLTIP = "The model from the token pruning node."
SAMPLES_TOOLTIP = "What the sampler gave. It is only waited for, so that there is something to show."
IMAGE_TOOLTIP = "If given, the picture is laid under the tokens."


def token_pruning(model: Any, method: str, rate: float, early_strength: float) -> Any:
    """Return a pruned clone of ``model``, or ``model`` itself at rate 0.

    Raises:
        ValueError: If the model cannot be pruned.
    """
    if rate == 0:
        return model
    chosen: Any = METHODS[method]
    if method == "matched" and is_transformer(model.get_model_object("diffusion_model")):
        chosen = TRANSFORMER_METHODS[method]
        if early_strength != 1:  # which says what early steps drop
            chosen = dataclasses.replace(chosen, dense_share=0.0)
    chosen = dataclasses.replace(chosen, rate=rate)
    return prune(model, chosen if early_strength == 1 else EarlyStrength(chosen, early_strength))


def by_plan(model: Any, plan: str) -> tuple[Any, int, float, str]:
    """Return a clone of ``model`` that does what a plan says, its steps and guidance, and what is left to other nodes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no plan, or one for another model.
    """
    read = read_plan(plan_file(plan))
    guidance = _USUAL_CFG if read.guidance is None else float(read.guidance)
    return apply_plan(model, read), read.steps, guidance, advice(read)


def plan_file(plan: str) -> Path:
    """Where a plan is: a path, or a name in ComfyUI's input folder."""
    file = Path(plan.strip().strip('"')).expanduser()
    if file.exists() or file.is_absolute() or "folder_paths" not in sys.modules:
        return file
    return Path(sys.modules["folder_paths"].get_input_directory()) / file


def plan_stamp(plan: str) -> str:
    """Tell one state of a plan's file from another, so that ComfyUI reads it again when it has changed."""
    file = plan_file(plan)
    return str(file.stat().st_mtime_ns) if file.is_file() else ""


def kept_tokens(model: Any, block: int, step: int, image: Tensor | None = None) -> tuple[Tensor, str]:
    """Draw which tokens were kept in the last run of a pruned model.

    Args:
        model: From `token_pruning`.
        block: Which of its blocks.
        step: Which step; -1 takes all.
        image: (images, height, width, 3) in [0, 1], to lay under; None draws the tokens alone.

    Returns:
        (images, height, width, 3) float32 in [0, 1], and a line that says what it shows.

    Raises:
        ValueError: If nothing was pruned.
    """
    pruning = pruning_of(model)
    if pruning is None:
        raise ValueError("this model is not pruned; connect the model that the token pruning node gives")
    spans = list(pruning.record.spans.values())
    if not spans:
        raise ValueError(
            "nothing was pruned yet with this model; connect what the sampler gives, so that it runs first"
        )
    span = spans[min(block, len(spans) - 1)]
    share = span.share(None if step < 0 else step)
    return _draw(share, image), _line(span, share, step)


def _draw(share: Tensor, image: Tensor | None) -> Tensor:
    """(images, h, w) shares as (images, height, width, 3) pictures, over ``image`` where there is one."""
    if image is None:
        scale = max(1, 512 // max(share.shape[1:]))
        return share.repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(-1).expand(-1, -1, -1, 3)
    image = image[..., :3].float().cpu()
    size = image.shape[1:3]
    over = torch.nn.functional.interpolate(share.unsqueeze(1), size=size, mode="nearest").movedim(1, -1)
    if len(over) != len(image):
        raise ValueError(f"the image holds {len(image)} pictures, and the run drew {len(over)}; connect the run's own")
    return image * (0.15 + 0.85 * over)


def _line(span: KeptInSpan, share: Tensor, step: int) -> str:
    height, width = span.size
    when = f"step {step}" if step >= 0 else f"{len(span.steps)} steps"
    return f"{span.place.name}: {width}×{height} tokens, {100 * share.mean():.0f} % of them kept, {when}"
