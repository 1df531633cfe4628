"""AT-EDM: attention-driven, training-free token pruning for diffusion U-Nets, on top of diffusers.

import atedm

atedm.apply(pipe)      # the paper's setting
image = pipe("a red circle above a blue square").images[0]
atedm.remove(pipe)     # exactly as before
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atedm.config import PRESETS, PruningConfig
    from atedm.costs.report import CostReport, cost
    from atedm.costs.tome import ToMe
    from atedm.patching.apply import apply, is_applied, observed, pruned, remove
    from atedm.patching.state import BlockObservation
    from atedm.patching.summary import PatchSummary
    from atedm.pipelines import load_pipeline
    from atedm.recording import Recording, recorded
    from atedm.schedule import BlockPlace
    from atedm.token_pruning import ToRefill
    from atedm.token_ranking import ToRank

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "BlockObservation",
    "BlockPlace",
    "CostReport",
    "PatchSummary",
    "PruningConfig",
    "Recording",
    "ToMe",
    "ToRank",
    "ToRefill",
    "apply",
    "cost",
    "is_applied",
    "load_pipeline",
    "observed",
    "pruned",
    "recorded",
    "remove",
]

# diffusers takes seconds to import, so nothing of it is touched before it is asked for.
_HOMES = {
    "PRESETS": "atedm.config",
    "BlockObservation": "atedm.patching.state",
    "BlockPlace": "atedm.schedule",
    "CostReport": "atedm.costs.report",
    "PatchSummary": "atedm.patching.summary",
    "PruningConfig": "atedm.config",
    "Recording": "atedm.recording",
    "ToMe": "atedm.costs.tome",
    "ToRank": "atedm.token_ranking",
    "ToRefill": "atedm.token_pruning",
    "apply": "atedm.patching.apply",
    "cost": "atedm.costs.report",
    "is_applied": "atedm.patching.apply",
    "load_pipeline": "atedm.pipelines",
    "observed": "atedm.patching.apply",
    "pruned": "atedm.patching.apply",
    "recorded": "atedm.recording",
    "remove": "atedm.patching.apply",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atedm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
