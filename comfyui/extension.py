"""The nodes by ComfyUI's current schema."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from . import nodes
from .nodes import Number


def _float(name: str, number: Number) -> Any:
    return io.Float.Input(
        name,
        default=number.default,
        min=number.least,
        max=number.most,
        step=number.step,
        tooltip=number.tooltip,
        display_mode=io.NumberDisplay.slider,
    )


def _int(name: str, number: Number) -> Any:
    return io.Int.Input(
        name, default=int(number.default), min=int(number.least), max=int(number.most), tooltip=number.tooltip
    )


class TokenPruning(io.ComfyNode):
    """A model in, a pruned clone of it out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="AtedmTokenPruning",
            display_name="Token pruning (AT-EDM / matched)",
            category=nodes.CATEGORY,
            description=nodes.PRUNING_DESCRIPTION,
            inputs=[
                io.Model.Input("model", tooltip=nodes.MODEL_TOOLTIP),
                io.Combo.Input("method", options=[*nodes.METHODS], tooltip=nodes.METHOD_TOOLTIP),
                _float("rate", nodes.RATE),
                _float("early_strength", nodes.EARLY),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, method: str, rate: float, early_strength: float) -> io.NodeOutput:
        """Run the node."""
        return io.NodeOutput(nodes.token_pruning(model, method, rate, early_strength))


class TokenPruningPlan(io.ComfyNode):
    """A model and a plan in, a clone that follows the plan out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="AtedmTokenPruningPlan",
            display_name="Token pruning plan",
            category=nodes.CATEGORY,
            description=nodes.PLAN_DESCRIPTION,
            inputs=[
                io.Model.Input("model", tooltip=nodes.UNET_TOOLTIP),
                io.String.Input("plan", default="plan.json", tooltip=nodes.PLAN_TOOLTIP),
            ],
            outputs=[
                io.Model.Output(),
                io.Int.Output(display_name="steps"),
                io.Float.Output(display_name="cfg"),
                io.String.Output(display_name="what is left to do"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, plan: str) -> str:
        """Tell whether the file has changed."""
        return nodes.plan_stamp(plan)

    @classmethod
    def execute(cls, model: Any, plan: str) -> io.NodeOutput:
        """Run the node."""
        return io.NodeOutput(*nodes.by_plan(model, plan))


class KeptTokens(io.ComfyNode):
    """A pruned model that was run in, a picture of the kept tokens out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="AtedmKeptTokens",
            display_name="Kept tokens",
            category=nodes.CATEGORY,
            description=nodes.KEPT_DESCRIPTION,
            inputs=[
                io.Model.Input("model", tooltip=nodes.PRUNED_TOOLTIP),
                io.Latent.Input("samples", tooltip=nodes.SAMPLES_TOOLTIP),
                _int("block", nodes.BLOCK),
                _int("step", nodes.STEP),
                io.Image.Input("image", optional=True, tooltip=nodes.IMAGE_TOOLTIP),
            ],
            outputs=[io.Image.Output(), io.String.Output(display_name="what it shows")],
        )

    @classmethod
    def execute(cls, model: Any, samples: Any, block: int, step: int, image: Any = None) -> io.NodeOutput:
        """Run the node."""
        return io.NodeOutput(*nodes.kept_tokens(model, block, step, image))


class TokenPruningExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List them."""
        return [TokenPruning, TokenPruningPlan, KeptTokens]


async def comfy_entrypoint() -> TokenPruningExtension:
    """Give ComfyUI the nodes."""
    return TokenPruningExtension()
