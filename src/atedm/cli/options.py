"""Options that several commands share, and the checks of what they are given."""

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

_LONGEST_SIDE = 32768
"""In pixels: longer than any U-Net can be run on, and short enough to be counted."""


MethodName = Enum("MethodName", {"matched": "matched", "paper": "paper", "dagger": "dagger", "turbo": "turbo"})
"""Names of methods, as in `atedm.METHODS`, which takes too long to import here."""
Precision = Enum("Precision", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"})
"""Of weights and activations."""


def checked_device(name: str | None) -> str | None:
    """Check that this machine has the device, if one is given."""
    if name is not None:
        from atedm.app.devices import check_device

        check_device(name)
    return name


def checked(what: str, is_right: Callable[[Any], bool]) -> Callable[[typer.CallbackParam, Any], Any]:
    """Return a check of the value of an option, if one is given; ``what`` says how it must be."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not is_right(value):
            raise ValueError(f"{param.name} must be {what}, not {value}")
        return value

    return check


at_least_one = checked("at least 1", lambda count: count >= 1)
a_share = checked("above 0, for there to be dropped tokens, and below 1", lambda rate: 0 < rate < 1)
a_scale = checked("0 or more and below 1000", lambda scale: 0 <= scale < 1000)
a_seed = checked("0 or more and below 2^62", lambda seed: 0 <= seed < 2**62)


def refuse_rate_and_budget(rate: float | None, budget: float | None) -> None:
    """Raise if both are given, because a budget is solved for its rate."""
    if rate is not None and budget is not None:
        raise ValueError("give --budget or --rate, not both: a budget is solved for its rate")


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


def panel(title: str | None) -> Callable[..., Any]:
    """Return what declares an option by its help, and names if it has special ones, under a title of `--help`."""

    def option(text: str | None, *names: str, **others: Any) -> Any:
        return typer.Option(*names, help=text, rich_help_panel=title, **others)

    return option


PLAIN, MODEL, PRUNING, IMAGES, OUTPUT = map(panel, (None, "Model", "Pruning", "Images", "Output"))

MODEL_HELP = (
    "**tiny**, the small SDXL that ships; **tiny-sd3**, the small SD3; **tiny-turbo** and **tiny-sd3-turbo**, their "
    "siblings for 4 steps; a hub id such as "
    "stabilityai/stable-diffusion-xl-base-1.0; a diffusers folder; or a single .safetensors file."
)
Model = Annotated[str, MODEL(MODEL_HELP)]
TimedModel = Annotated[
    str,
    MODEL(
        "**tiny**, **tiny-turbo**, **tiny-sd3**, **tiny-sd3-turbo**, **sdxl**, **sdxl-turbo**, **sd15**, **sd21**, a "
        "folder or a hub id; only the config is read."
    ),
]
Device = Annotated[str | None, MODEL("cuda, mps or cpu; by default the fastest.", callback=checked_device)]
Dtype = Annotated[Precision | None, MODEL("By default what suits the device.")]

Method = Annotated[
    MethodName | None,
    PRUNING(
        "**matched** is our own. The paper's are **paper**, **dagger** (second level unpruned) and **turbo** "
        "(few steps). By default what suits the model."
    ),
]
MethodText = Annotated[
    str, PRUNING("**matched**, **paper**, **dagger** or **turbo**, with changes in brackets: paper[rate=0.5].")
]
Rate = Annotated[float | None, PRUNING("Share of the tokens that is dropped, in [0, 1).")]
RateOfProbe = Annotated[float, PRUNING("Share of the tokens that is dropped.", callback=a_share)]
Budget = Annotated[
    float | None, PRUNING("What the run may cost, such as 0.7 of the dense arithmetic. Solves for the rate.")
]

Prompts = Annotated[
    str, IMAGES("**scenes**, held-out captions of the shipped model; a .txt or .csv file; or a folder of MS-COCO.")
]
OwnPrompts = Annotated[
    Path | None, IMAGES("A .txt file, a prompt a line, or a .csv file; a few hundred to train. By default our own.")
]
Captions = Annotated[int, IMAGES("How many prompts or held-out scenes to draw.", callback=at_least_one)]
Steps = Annotated[
    int | None,
    IMAGES("By default 20 for **tiny**, 4 for few-step models, 28 for transformers, else 50.", callback=at_least_one),
]
StepsOfProbe = Annotated[int, IMAGES("Denoising steps of an image.", callback=at_least_one)]
Guidance = Annotated[float | None, IMAGES("Scale; by default what suits the model.", callback=a_scale)]
IsGuided = Annotated[bool | None, IMAGES("Whether the U-Net runs twice for an image; by default what suits the model.")]
Size = Annotated[str | None, IMAGES("WxH in pixels; by default the model's own.")]
Seed = Annotated[int, IMAGES("Of the first image, and of the scenes.", callback=a_seed)]
Batch = Annotated[int, IMAGES("Images at a time.", callback=at_least_one)]

Repeats = Annotated[int, PLAIN("Rounds, after one to warm up.", callback=at_least_one)]
Json = Annotated[bool, OUTPUT("Print JSON with everything.", "--json")]
Plot = Annotated[Path | None, OUTPUT("Also draw a chart into this PNG.")]
Folder = Annotated[Path, OUTPUT("Folder; what was stopped goes on there.")]
