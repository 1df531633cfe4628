"""Methods by name, and methods as they are stored in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from atedm.method.at_edm import DAGGER, TURBO, AtEdm
from atedm.method.contract import Method
from atedm.method.matched import Matched
from atedm.method.places import WHERES
from atedm.method.schedule import Early
from atedm.words import check_name

#: Our own method, and the paper's settings: AT-EDM, AT-EDM† (no pruning at the second level), and one for few steps.
METHODS: dict[str, Method] = {"matched": Matched(), "paper": AtEdm(), "dagger": DAGGER, "turbo": TURBO}

#: The same for transformers, where a run begins dense, and a token keeps all of its own last update.
TRANSFORMER_METHODS: dict[str, Method] = METHODS | {
    "matched": Matched(rate=0.6, level_factors=(), own_update_share=1.0, dense_share=0.3)
}

#: What is taken where none is named: the method that the figures support for every model (docs/reference/results.md).
DEFAULT = "matched"

_KINDS: dict[str, type[Any]] = {"at-edm": AtEdm, "matched": Matched}


def method_named(name: str, *, transformer: bool = False) -> Method:
    """Return the method called ``name``, as it is for U-Nets or for transformers.

    Raises:
        ValueError: If there is none; the message names the nearest one.
    """
    check_name("method", name, METHODS)
    return (TRANSFORMER_METHODS if transformer else METHODS)[name]


def method_from_dict(values: Mapping[str, Any]) -> Method:
    """Read back what `Method.as_dict` gave. Nothing is imported that it names.

    Raises:
        ValueError: If it is not such a dictionary, or holds a function of one's own.
    """
    fields = dict(values)
    kind = _KINDS.get(str(fields.pop("method", None)))
    if kind is None:
        raise ValueError(f"method must be one of {', '.join(map(repr, _KINDS))}, not {values.get('method')!r}")
    known = {field.name for field in dataclasses.fields(kind) if field.repr}  # a correction is a file of its own
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it may be from another version of atedm")
    if "where" in fields:
        check_name("where", fields["where"], WHERES)
        fields["where"] = WHERES[fields["where"]]
    if isinstance(spare := fields.get("spare"), Mapping):
        if strange := sorted(spare.keys() - {"share", "pairing"}):
            raise ValueError(f"Early has no field {strange[0]!r}")
        fields["spare"] = Early(**spare)
    method: Method = kind(**fields)
    return method
