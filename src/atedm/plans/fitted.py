"""The fitted refill of a plan: a file of matrices, and the method that uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from atedm.files import written_whole
from atedm.method.contract import Method
from atedm.method.correction import Correction, Corrector
from atedm.method.matched import Matched


def with_correction(method: Method, correction: Corrector | None) -> Method:
    """Return matched pruning with a correction.

    Raises:
        ValueError: If it is another method.
    """
    if not isinstance(method, Matched):
        raise ValueError(f"only matched pruning has a refill that can be fitted, not {method.name}")
    return dataclasses.replace(method, correction=correction)


def save_correction(maps: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write the matrices, whole or not at all."""
    with written_whole(file) as partial:
        save_file({name: one.contiguous() for name, one in maps.items()}, partial, metadata=dict(metadata))


def read_correction(file: Path, spans: Mapping[str, object]) -> Correction:
    """Read the matrices for a model with ``spans``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none, or is of other spans.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the fitted refill of this plan is not at {str(file)!r}; find it by `atedm fit`")
    try:
        correction = Correction(load_file(file))
    except Exception as error:  # safetensors raises many kinds
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(file)!r} is no fitted refill: {line}") from error
    if unknown := [name for name in correction.maps if name not in spans]:
        raise ValueError(f"{str(file)!r} was fitted on another model: this one has no {unknown[0]}")
    return correction
