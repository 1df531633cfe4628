"""Training-free token pruning for diffusion models: matched pruning and AT-EDM, on top of diffusers.

import atedm

atedm.apply(pipe)      # the method that the figures support
image = pipe("a butterfly above a rose").images[0]
atedm.remove(pipe)     # exactly as before
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atedm.app.models import load_pipeline
    from atedm.costs.report import CostReport, cost
    from atedm.costs.tome import ToMe
    from atedm.export import FixedPhase
    from atedm.hosts.state import Observation
    from atedm.method.at_edm import AtEdm, ToRefill
    from atedm.method.contract import Cut, Place, View
    from atedm.method.matched import Matched
    from atedm.method.places import everywhere, not_second_level, only_second_level
    from atedm.method.presets import METHODS
    from atedm.method.schedule import Early
    from atedm.patch import apply, is_applied, observed, pruned, remove
    from atedm.plans.plan import Plan, read_plan
    from atedm.record import Recording, recorded
    from atedm.summary import PatchSummary
    from atedm.tuning.finetune import finetune
    from atedm.tuning.fit import fit
    from atedm.tuning.tune import tune

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "AtEdm",
    "CostReport",
    "Cut",
    "Early",
    "FixedPhase",
    "Matched",
    "Observation",
    "PatchSummary",
    "Place",
    "Plan",
    "Recording",
    "ToMe",
    "ToRefill",
    "View",
    "apply",
    "cost",
    "everywhere",
    "finetune",
    "fit",
    "is_applied",
    "load_pipeline",
    "not_second_level",
    "observed",
    "only_second_level",
    "pruned",
    "read_plan",
    "recorded",
    "remove",
    "tune",
]

# diffusers takes seconds to import, so nothing of it is touched before it is asked for.
_HOMES = {
    "METHODS": "atedm.method.presets",
    "AtEdm": "atedm.method.at_edm",
    "CostReport": "atedm.costs.report",
    "Cut": "atedm.method.contract",
    "Early": "atedm.method.schedule",
    "FixedPhase": "atedm.export",
    "Matched": "atedm.method.matched",
    "Observation": "atedm.hosts.state",
    "PatchSummary": "atedm.summary",
    "Place": "atedm.method.contract",
    "Plan": "atedm.plans.plan",
    "Recording": "atedm.record",
    "ToMe": "atedm.costs.tome",
    "ToRefill": "atedm.method.at_edm",
    "View": "atedm.method.contract",
    "apply": "atedm.patch",
    "cost": "atedm.costs.report",
    "everywhere": "atedm.method.places",
    "finetune": "atedm.tuning.finetune",
    "fit": "atedm.tuning.fit",
    "is_applied": "atedm.patch",
    "load_pipeline": "atedm.app.models",
    "not_second_level": "atedm.method.places",
    "observed": "atedm.patch",
    "only_second_level": "atedm.method.places",
    "pruned": "atedm.patch",
    "read_plan": "atedm.plans.plan",
    "recorded": "atedm.record",
    "remove": "atedm.patch",
    "tune": "atedm.tuning.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atedm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
