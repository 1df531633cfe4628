"""AT-EDM: attention-driven, training-free token pruning for diffusion U-Nets, on top of diffusers.

import atedm

atedm.apply(pipe)      # the paper's setting
image = pipe("a red circle above a blue square").images[0]
atedm.remove(pipe)     # exactly as before
"""

from atedm.config import PRESETS, PruningConfig
from atedm.patching.apply import apply, is_applied, observed, pruned, remove
from atedm.patching.summary import PatchSummary
from atedm.patching.transformer import BlockObservation
from atedm.schedule import BlockPlace

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "BlockObservation",
    "BlockPlace",
    "PatchSummary",
    "PruningConfig",
    "apply",
    "is_applied",
    "observed",
    "pruned",
    "remove",
]
