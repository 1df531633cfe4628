"""Import packages of the extras where they are needed, and say how to install them where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def optional(module: str, extra: str = "lab") -> Any:
    """Import a module of a package that the base install lacks.

    Args:
        module: Its name, such as "cleanfid.fid".
        extra: The extra of atedm that brings it.

    Raises:
        ImportError: If it cannot be imported; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module.partition('.')[0]}: pip install 'atedm[{extra}]' ({error})") from error
