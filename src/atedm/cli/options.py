"""Options that several commands share, and the checks of what they are given."""

from __future__ import annotations

import math
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

_LONGEST_SIDE = 32768
"""In pixels: longer than any U-Net can be run on, and short enough to be counted."""


class MethodName(str, Enum):
    """Names of methods, as in `atedm.METHODS`, which takes too long to import here."""

    matched = "matched"
    paper = "paper"
    dagger = "dagger"
    turbo = "turbo"


def checked_device(name: str | None) -> str | None:
    """Check that this machine has the device, if one is given."""
    if name is not None:
        from atedm.app.devices import check_device

        check_device(name)
    return name


def at_least_one(param: typer.CallbackParam, value: int | None) -> int | None:
    """Check a count, if one is given."""
    if value is not None and value < 1:
        raise ValueError(f"{param.name} must be at least 1, not {value}")
    return value


def checked_guidance(scale: float | None) -> float | None:
    """Check a guidance scale, if one is given."""
    if scale is not None and not (math.isfinite(scale) and 0 <= scale < 1000):
        raise ValueError(f"guidance must be 0 or more and below 1000, not {scale}")
    return scale


def checked_seed(seed: int) -> int:
    """Check that a seed is in the range that every random generator takes."""
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must be 0 or more and below 2^62, not {seed}")
    return seed


MODEL_HELP = (
    "**tiny**, the model that ships; a hub id such as stabilityai/stable-diffusion-xl-base-1.0; "
    "a diffusers folder; or a single .safetensors file."
)
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel="Model")]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cuda, mps or cpu; by default the fastest.", rich_help_panel="Model", callback=checked_device),
]
MethodNameOption = Annotated[
    MethodName | None,
    typer.Option(
        help="**matched** is our own. The paper's are **paper**, **dagger** (second level unpruned) and **turbo** "
        "(few steps). By default what suits the model.",
        rich_help_panel="Pruning",
    ),
]
RateOption = Annotated[
    float | None, typer.Option(help="Share of the tokens that is dropped, in [0, 1).", rich_help_panel="Pruning")
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        help="What the run may cost, such as 0.7 of the dense arithmetic. Solves for the rate.",
        rich_help_panel="Pruning",
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        help="A plan.json that `atedm tune` found: it sets the steps, the method and the rest.",
        rich_help_panel="Pruning",
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(help="WxH in pixels; by default the model's own.", rich_help_panel="Image")
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        help="Denoising steps; by default 20 for **tiny**, 4 for few-step models, 28 for transformers, else 50.",
        rich_help_panel="Image",
        callback=at_least_one,
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder for the results.", rich_help_panel="Output")]


def pixels(size: str | None) -> tuple[int, int] | None:
    """Read "WxH" in pixels; None leaves the size to the model."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+)[x×](\d+)", size.strip().lower())
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT in pixels, such as 128x128, not {size!r}")
    width, height = int(match[1]), int(match[2])
    if not all(8 <= side <= _LONGEST_SIDE for side in (width, height)):
        raise ValueError(f"sides must be from 8 to {_LONGEST_SIDE} pixels, not {size!r}")
    return width, height


def refuse_rate_and_budget(rate: float | None, budget: float | None) -> None:
    """Raise if both are given, because a budget is solved for its rate."""
    if rate is not None and budget is not None:
        raise ValueError("give --budget or --rate, not both: a budget is solved for its rate")
