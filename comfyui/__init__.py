"""Token pruning for ComfyUI: SDXL, SD 1.5 and FLUX at less cost, without training.

The methods are those of the package `atedm`. A released folder carries the part of it that they need, in ``lib``; a
checkout takes them from the sources beside it. Neither needs anything that ComfyUI does not have.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_BUNDLED, _CHECKOUT = _HERE / "lib", _HERE.parent / "src"

# Behind what is installed, so that a package of that name keeps its place.
sys.path.append(str(_BUNDLED if _BUNDLED.is_dir() else _CHECKOUT))
try:
    import atedm.hosts.comfyui  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the package atedm that Python finds has no part for ComfyUI; it is older than these nodes: update it, or "
        f"uninstall it, and the nodes use their own ({error})"
    ) from error

try:
    from comfy_api.latest import ComfyExtension as _  # noqa: F401
except ImportError:  # before ComfyUI 0.3.48
    from .classic import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
else:
    from .extension import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

#: Where the help pages are.
WEB_DIRECTORY = "./web"
