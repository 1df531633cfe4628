"""Options that several commands share, and how they become a pruning config."""

from __future__ import annotations

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
DeviceOption = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu; the fastest there is by default.", rich_help_panel="Model")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="The paper's settings, **paper**, **dagger** (second level unpruned) and **turbo** (few steps); or our "
        "own, **matched**. "
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
BatchOption = Annotated[int, typer.Option(help="Images at a time.", rich_help_panel="Image")]
TimedGuidanceOption = Annotated[
    bool | None,
    typer.Option(help="Whether the U-Net runs on two of each; by default as usual.", rich_help_panel="Image"),
]
RepeatsOption = Annotated[int, typer.Option(help="Times that everything is timed, after once to warm up.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        help="What the mean step may cost, as a share of the dense step, such as 0.7; solved for the rate.",
        rich_help_panel="Pruning",
    ),
]
CaptionSteps = Annotated[int, typer.Option(help="Denoising steps.")]
CaptionGuidance = Annotated[float, typer.Option(help="Guidance scale.")]
CaptionSeed = Annotated[int, typer.Option(help="Seed of captions and noise.")]
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
    return int(match[1]), int(match[2])


def budget_share(budget: float | None, pruning_rate: float | None) -> float | None:
    """Return the budget as it is, after a look that no rate is given beside it."""
    if budget is not None and pruning_rate is not None:
        raise ValueError("give --budget or --pruning-rate, not both: a budget is solved for its rate")
    return budget
