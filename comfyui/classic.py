"""The same nodes for a ComfyUI that has no ``comfy_api.latest``."""

from __future__ import annotations

from typing import Any

from . import nodes
from .nodes import Number


def _number(kind: str, number: Number, **more: Any) -> tuple[str, dict[str, Any]]:
    cast = int if kind == "INT" else float
    limits = {"default": cast(number.default), "min": cast(number.least), "max": cast(number.most)}
    return kind, limits | {"step": cast(number.step), "tooltip": number.tooltip} | more


class TokenPruning:
    """A model in, a pruned clone of it out."""

    CATEGORY = nodes.CATEGORY
    DESCRIPTION = nodes.PRUNING_DESCRIPTION
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": nodes.MODEL_TOOLTIP}),
                "method": ([*nodes.METHODS], {"tooltip": nodes.METHOD_TOOLTIP}),
                "rate": _number("FLOAT", nodes.RATE, display="slider"),
                "early_strength": _number("FLOAT", nodes.EARLY, display="slider"),
            }
        }

    def execute(self, model: Any, method: str, rate: float, early_strength: float) -> tuple[Any]:
        """Run the node."""
        return (nodes.token_pruning(model, method, rate, early_strength),)


class TokenPruningPlan:
    """A model and a plan in, a clone that follows the plan out."""

    CATEGORY = nodes.CATEGORY
    DESCRIPTION = nodes.PLAN_DESCRIPTION
    RETURN_TYPES = ("MODEL", "INT", "FLOAT", "STRING")
    RETURN_NAMES = ("MODEL", "steps", "cfg", "what is left to do")
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": nodes.UNET_TOOLTIP}),
                "plan": ("STRING", {"default": "plan.json", "tooltip": nodes.PLAN_TOOLTIP}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, plan: str) -> str:
        """Tell whether the file has changed."""
        return nodes.plan_stamp(plan)

    def execute(self, model: Any, plan: str) -> tuple[Any, int, float, str]:
        """Run the node."""
        return nodes.by_plan(model, plan)


class KeptTokens:
    """A pruned model that was run in, a picture of the kept tokens out."""

    CATEGORY = nodes.CATEGORY
    DESCRIPTION = nodes.KEPT_DESCRIPTION
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("IMAGE", "what it shows")
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Describe the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": nodes.PRUNED_TOOLTIP}),
                "samples": ("LATENT", {"tooltip": nodes.SAMPLES_TOOLTIP}),
                "block": _number("INT", nodes.BLOCK),
                "step": _number("INT", nodes.STEP),
            },
            "optional": {"image": ("IMAGE", {"tooltip": nodes.IMAGE_TOOLTIP})},
        }

    def execute(self, model: Any, samples: Any, block: int, step: int, image: Any = None) -> tuple[Any, str]:
        """Run the node."""
        return nodes.kept_tokens(model, block, step, image)


NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {
    "AtedmTokenPruning": TokenPruning,
    "AtedmTokenPruningPlan": TokenPruningPlan,
    "AtedmKeptTokens": KeptTokens,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AtedmTokenPruning": "Token pruning (AT-EDM / matched)",
    "AtedmTokenPruningPlan": "Token pruning plan",
    "AtedmKeptTokens": "Kept tokens",
}
