"""Which model a plan is for: what of a model decides what it costs and what it bears."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from atedm.hosts.models import find_model, is_transformer
from atedm.plans.plan import refuse_difference

_FIELDS = (
    "sample_size",
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
)
_OF_TRANSFORMERS = (
    "sample_size",
    "in_channels",
    "patch_size",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
)


def fingerprint(target: Any) -> dict[str, Any]:
    """Describe the model of a pipeline, or a model, as plain JSON values.

    Raises:
        TypeError: If there is none that can be pruned.
    """
    model = find_model(target)
    part, fields = ("transformer", _OF_TRANSFORMERS) if is_transformer(model) else ("unet", _FIELDS)
    found: dict[str, Any] = {part: type(model).__name__}
    for name in fields:
        value = model.config.get(name)
        found[name] = list(value) if isinstance(value, tuple) else value
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        found = {"pipeline": type(target).__name__, **found}
        found["prediction_type"] = scheduler.config.get("prediction_type")
    return found


def refuse_other_model(planned: Mapping[str, Any], target: Any) -> None:
    """Raise a `ValueError` that names what differs, unless a plan for ``planned`` is for the model of ``target``."""
    for name, here in fingerprint(target).items():
        if name not in planned:
            raise ValueError(f"this plan does not say for which {name} it is; find one for this model by `atedm tune`")
        if name != "pipeline":  # image-to-image is the same model
            refuse_difference(name, planned[name], here)


def checksum(model: torch.nn.Module) -> int:
    """Tell one set of weights from another: a checksum of the first numbers of every parameter."""
    total = 0
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.detach().flatten()[:256].float().cpu().numpy().tobytes()
        total = zlib.crc32(name.encode() + first, total)
    return total
