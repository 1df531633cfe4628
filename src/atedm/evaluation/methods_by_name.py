"""Methods as a user writes them: ``paper``, ``tome[ratio=0.5]``, ``paper[recovery=direct-copy]+deepcache``."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from atedm.choices import OWN_FIELDS, Own, check_name
from atedm.config import PRESETS, PruningConfig
from atedm.costs.fit import fit_to_budget, mean_share
from atedm.costs.tome import ToMe
from atedm.evaluation.methods import Caching, Dense, Merging, Method, Pruning, Stacked

NAMES = ("dense", *PRESETS, "tome", "deepcache")
EQUAL_COST = "cost"
"""Key that has a rate or ratio solved for the mean cost of another method: ``tome[cost=paper]``."""
SOLVED = ("pruning_rate", "ratio", "steps_share")
"""Fields that are solved for a cost."""


def parse_methods(specs: str) -> list[str]:
    """Split "dense, paper[...], tome" at the commas outside of brackets.

    Raises:
        ValueError: If there is none, or one comes twice.
    """
    found = [spec for spec in _split(specs, ",") if spec]
    if not found:
        raise ValueError("methods must name at least one method, such as dense,paper,tome[ratio=0.5]")
    twice = {spec for spec in found if found.count(spec) > 1}
    if twice:
        raise ValueError(f"{sorted(twice)[0]!r} is named twice")
    return found


def method_by_name(
    spec: str,
    model: Any = "tiny",
    *,
    size: tuple[int, int] | None = None,
    steps: int = 50,
) -> Method:
    """Return the method that ``spec`` describes.

    A name, one of `NAMES`, with changes to its fields in brackets; several joined by ``+`` are applied from left to
    right. ``cost=NAME`` in the brackets solves for the rate or ratio at which a run costs what NAME does, ``cost=0.7``
    for a share of the dense cost; for dense itself that is a share of the steps. A ranking, map mode, recovery or
    schedule can be a function of one's own, ``paper[ranking=MODULE:NAME]``.

        >>> method_by_name("tome[ratio=0.4]")
        Merging(tome=ToMe(ratio=0.4, merge='everything', levels='all', prune_less_share=0.0, unpruned_blocks='F-L'))

    Args:
        spec: What to parse.
        model: As `atedm.cost`, for equal cost.
        size: (width, height) in pixels, for equal cost.
        steps: Steps of the run, for equal cost.

    Raises:
        ValueError: If a name or a field is unknown, a cost cannot be had, or is given beside what is solved for it.
    """
    parts = _split(spec, "+")
    if len(parts) > 1:
        methods: list[Method] = []
        for part in parts:  # each is solved for the steps that those before it leave
            methods.append(method_by_name(part, model, size=size, steps=steps))
            steps = methods[-1].steps_of(steps)
        return Stacked(tuple(methods))
    match = re.fullmatch(r"([\w-]+)(?:\[(.*)\])?", spec.strip())
    if match is None:
        raise ValueError(f"cannot read the method {spec!r}; write NAME or NAME[field=value,...]")
    name, fields = match[1], _fields(match[2] or "")
    check_name("method", name, NAMES)
    if EQUAL_COST not in fields:
        return _build(name, fields)
    other = fields.pop(EQUAL_COST)
    if twice := [field for field in fields if field in SOLVED]:
        raise ValueError(f"give {twice[0]} or {EQUAL_COST} in {spec!r}, not both: a cost is solved for it")
    method = _build(name, fields)
    if isinstance(other, int | float) and not isinstance(other, bool):
        return _at_cost(float(other), method, model, size, steps)
    return _at_cost_of(str(other), method, model, size, steps)


def _split(text: str, separator: str) -> list[str]:
    """Split where ``separator`` stands outside of all brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "[") - (sign == "]")
        if sign == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    if depth:
        raise ValueError(f"cannot read {text!r}: its brackets do not match")
    return [part.strip() for part in parts]


def _fields(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for pair in filter(None, _split(text, ",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"cannot read {pair!r}; write field=value")
        if key.strip() in fields:
            raise ValueError(f"{key.strip()} is given twice in [{text}]")
        try:
            fields[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[key.strip()] = value.strip()
    return fields


def _build(name: str, fields: dict[str, Any]) -> Method:
    if name in PRESETS:
        for field in OWN_FIELDS:
            if ":" in str(fields.get(field, "")):
                fields[field] = own_function(str(fields[field]))
        return Pruning(PRESETS[name].replace(**fields))
    if name == "tome":
        return Merging(_replace(ToMe(), fields))
    if name == "deepcache":
        caching: Caching = _replace(Caching(), fields)
        return caching
    dense: Dense = _replace(Dense(), fields)
    return dense


def own_function(name: str) -> Own:
    """Import a function from outside of the package, by MODULE:NAME; the current folder is looked in too.

    Raises:
        ValueError: If there is none.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # as Python itself would, had it been given a script
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {name!r}, read as MODULE:NAME: {error}") from error
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}, not a function")
    function: Own = found
    return function


def _replace(default: Any, fields: dict[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(default)]
    for key in fields:
        check_name("field", key, known)
    return dataclasses.replace(default, **fields)


def _at_cost_of(other: str, method: Method, model: Any, size: tuple[int, int] | None, steps: int) -> Method:
    target = method_by_name(other, model, size=size, steps=steps)
    if not isinstance(target, Pruning | Merging):
        raise ValueError(f"cost must be a share of dense, or the name of a way to prune or of tome, not {other!r}")
    what = target.config if isinstance(target, Pruning) else target.tome
    return _at_cost(mean_share(model, what, size=size, steps=steps), method, model, size, steps)


def _at_cost(share: float, method: Method, model: Any, size: tuple[int, int] | None, steps: int) -> Method:
    if isinstance(method, Dense):
        return Dense(share)
    if not isinstance(method, Pruning | Merging):
        raise ValueError("a cost is solved for dense steps, for pruning and for ToMe")
    what = method.config if isinstance(method, Pruning) else method.tome
    fitted = fit_to_budget(model, what, share=share, size=size, steps=steps)
    return Pruning(fitted) if isinstance(fitted, PruningConfig) else Merging(fitted)
