"""Nodes for the page that hand out the model that ships. `page.py` puts them into an application of its own."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parents[1] / "src")]
sys.modules.setdefault("engine", types.ModuleType("engine"))  # the application runs already

import shipped  # noqa: E402
from small import SHELF  # noqa: E402


class ShippedModel:
    """The model, a prompt as its text encoders give it, an empty latent image and its sigmas."""

    FUNCTION, CATEGORY = "execute", "test"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT", "SIGMAS")
    RETURN_NAMES = ("MODEL", "positive", "negative", "LATENT", "SIGMAS")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"prompt": ("STRING", {"multiline": True})}}

    def execute(self, prompt: str) -> tuple[Any, ...]:
        SHELF["pipe"] = shipped.bring(prompt)
        return tuple(SHELF[name] for name in ("shipped", "positive", "negative", "empty", "sigmas"))


class ShippedDecode:
    """Its autoencoder."""

    FUNCTION, CATEGORY = "execute", "test"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def execute(self, samples: dict[str, Any]) -> tuple[Any]:
        latents = samples["samples"] * SHELF["shipped"].model.latent_format.scale_factor
        return (shipped.decode(SHELF["pipe"], latents).movedim(0, -1).unsqueeze(0),)


NODE_CLASS_MAPPINGS = {"ShippedModel": ShippedModel, "ShippedDecode": ShippedDecode}
NODE_DISPLAY_NAME_MAPPINGS = {"ShippedModel": "The model that ships", "ShippedDecode": "Decode (the model that ships)"}
