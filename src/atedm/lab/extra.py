"""Import packages of the extras where they are needed, and say how to install them where they are missing."""

from importlib import import_module
from typing import Any


def optional(module: str, extra: str = "lab") -> Any:
    """Import a module such as "cleanfid.fid", or raise an `ImportError` that names the extra which brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module.partition('.')[0]}: pip install 'atedm[{extra}]' ({error})") from error
