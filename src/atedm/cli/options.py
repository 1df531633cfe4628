"""Options that several commands share, and how they become a pruning config."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from atedm.config import PruningConfig

MODEL_HELP = (
    "**tiny**, the model that ships; a hub id such as stabilityai/stable-diffusion-xl-base-1.0; "
    "a diffusers folder; or a single .safetensors file."
)

ModelOption = Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel="Model")]
_LONGEST_SIDE = 32768
"""In pixels; longer than any U-Net of today can be run on, and short enough to be counted."""


def checked_device(name: str | None) -> str | None:
    """See that there is such a device, where one is asked for."""
    if name is not None:
        from atedm.pipelines import check_device

        check_device(name)
    return name


def at_least_one(param: typer.CallbackParam, value: int | None) -> int | None:
    """See that a count is one, where it is given."""
    if value is not None and value < 1:
        raise ValueError(f"{param.name} must be at least 1, not {value}")
    return value


def checked_guidance(scale: float | None) -> float | None:
    """See that a guidance scale is one, where it is asked for."""
    if scale is not None and not (math.isfinite(scale) and 0 <= scale < 1000):
        raise ValueError(f"guidance must be 0 or more and below 1000, not {scale}")
    return scale


def checked_seed(seed: int) -> int:
    """See that a seed is in the range that everything which draws from it takes."""
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must be 0 or more and below 2^62, not {seed}")
    return seed


DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="cuda, mps or cpu; the fastest there is by default.", rich_help_panel="Model", callback=checked_device
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="The paper's settings, **paper**, **dagger** (second level unpruned) and **turbo** (few steps); or our "
        "own, **matched** and, for small images at half of the cost, **matched-deep**. "
        "By default what suits the model.",
        rich_help_panel="Pruning",
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(help="Share of the tokens dropped, in [0, 1): the one slider.", rich_help_panel="Pruning"),
]
TimedModelOption = Annotated[
    str,
    typer.Option(
        help="**tiny**, the model that ships; or **sdxl**, **sdxl-turbo**, **sd15**, **sd21**, a diffusers folder "
        "or a hub id, of which only the config is read: their weights are random.",
        rich_help_panel="Model",
    ),
]
TimedDtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; by default float32 on the CPU, else float16.", rich_help_panel="Model"
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(help="WxH in pixels; by default the model's own.", rich_help_panel="Image")
]
BatchOption = Annotated[int, typer.Option(help="Images at a time.", rich_help_panel="Image", callback=at_least_one)]
TimedGuidanceOption = Annotated[
    bool | None,
    typer.Option(help="Whether the U-Net runs on two of each; by default as usual.", rich_help_panel="Image"),
]
RepeatsOption = Annotated[
    int, typer.Option(help="Times that everything is timed, after once to warm up.", callback=at_least_one)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        help="What the mean step may cost, as a share of the dense step, such as 0.7; solved for the rate.",
        rich_help_panel="Pruning",
    ),
]
CaptionSteps = Annotated[int, typer.Option(help="Denoising steps.", callback=at_least_one)]
CaptionGuidance = Annotated[float, typer.Option(help="Guidance scale.", callback=checked_guidance)]
CaptionSeed = Annotated[int, typer.Option(help="Seed of captions and noise.", callback=checked_seed)]
OutOption = Annotated[Path, typer.Option(help="Folder for the results.", rich_help_panel="Output")]


def pruning_config(preset_name: str, pruning_rate: float | None) -> PruningConfig:
    """Return the preset, at another rate if one is given."""
    from atedm.config import preset

    config = preset(preset_name)
    return config if pruning_rate is None else config.replace(pruning_rate=pruning_rate)


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Read "WxH" in pixels; None leaves the size to the model."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)[x×](\d+)", size.strip().lower())
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT in pixels, such as 128x128, not {size!r}")
    width, height = int(match[1]), int(match[2])
    if not all(8 <= side <= _LONGEST_SIDE for side in (width, height)):
        raise ValueError(f"sides must be from 8 to {_LONGEST_SIDE} pixels, not {size!r}")
    return width, height


def budget_share(budget: float | None, pruning_rate: float | None) -> float | None:
    """Return the budget as it is, after a look that no rate is given beside it."""
    if budget is not None and pruning_rate is not None:
        raise ValueError("give --budget or --pruning-rate, not both: a budget is solved for its rate")
    return budget
