"""What suits a model where the user leaves it open: the one answer that every command and function asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from atedm.method.presets import DEFAULT
from atedm.tiny import SHIPPED


@dataclass(frozen=True)
class Suits:
    """What suits a model."""

    #: Name of the method, one of `atedm.method.presets.METHODS`.
    method: str
    steps: int
    #: Guidance scale; 0 for models that are run without.
    guidance: float
    prompts: tuple[str, ...]


_PICTURES = (
    "a red fox sitting in fresh snow, morning light",
    "a bowl of ramen with a soft boiled egg, top view",
    "an old lighthouse on a cliff in a storm, oil painting",
    "three birds walking around a dry grass field",
)
_SCENES = (
    "a butterfly above a rose in a green meadow",
    "a frog left of a castle by the sea",
    "an alarm clock, a castle and a fire engine in the snow",
    "a robot in front of a bus under a night sky",
)


def suits(model: str) -> Suits:
    """Return the method, steps, guidance and prompts that suit a model, by its name.

    The method is the same for every model: the one that the figures support (docs/reference/results.md).
    """
    prompts = _SCENES if model in SHIPPED else _PICTURES
    if draws_in_few_steps(model):
        return Suits(DEFAULT, steps=4, guidance=0.0, prompts=prompts)
    if model in SHIPPED:
        return Suits(DEFAULT, steps=20, guidance=3.0, prompts=prompts)
    if re.search(_TRANSFORMERS, _last_part(model), re.IGNORECASE):
        return Suits(DEFAULT, steps=28, guidance=4.0, prompts=prompts)
    return Suits(DEFAULT, steps=50, guidance=7.0, prompts=prompts)


_TRANSFORMERS = r"flux|sd-?3|stable-diffusion-3|qwen-?image|z-?image|chroma|hunyuanimage|cogview4|auraflow"

_FEW_STEPS = r"turbo|lightning|schnell|klein|hyper[-_ ]?sd|(?<![a-z])(lcm|tcd)"


def draws_in_few_steps(model: str) -> bool:
    """Whether a model is made for few steps, by the last part of its name."""
    return bool(re.search(_FEW_STEPS, _last_part(model), re.IGNORECASE))


def _last_part(model: str) -> str:
    """What a model is called, of a name, a folder or a folder in the cache of the hub."""
    parts = [*Path(model).parts]
    if len(parts) > 1 and parts[-1] in ("unet", "controlnet"):
        parts.pop()
    if len(parts) > 2 and parts[-2] == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else model
