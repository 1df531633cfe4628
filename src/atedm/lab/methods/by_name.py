"""Methods as a user writes them: ``paper``, ``tome[ratio=0.5]``, ``paper[refill=direct-copy]+deepcache``."""

import dataclasses
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from atedm.costs.architectures import architecture
from atedm.costs.budget import fit_to_budget, run_cost
from atedm.costs.tome import ToMe
from atedm.lab.ablation import Variant, variant_of
from atedm.lab.methods.candidates import Candidate, Dense, Planned, Pruning
from atedm.lab.methods.diffusers_caches import CACHES
from atedm.lab.methods.peers import Caching, Merging
from atedm.lab.methods.stacked import Stacked
from atedm.method.contract import Method
from atedm.method.places import WHERES
from atedm.method.presets import METHODS, method_named
from atedm.plans.plan import read_plan
from atedm.words import check_name

T = TypeVar("T")

NAMES = ("dense", *METHODS, "tome", "deepcache", *CACHES)
EQUAL_COST = "cost"
"""Key that solves a rate or ratio for the cost of another method: ``tome[cost=paper]``."""
SOLVED = ("rate", "ratio", "steps_share")
"""Fields that are solved for a cost."""


def parse_methods(specs: str) -> list[str]:
    """Split "dense, paper[...], tome" at the commas outside of brackets.

    Raises a `ValueError` if there is none, or one is named twice.
    """
    found = [spec for spec in _split(specs, ",") if spec]
    if not found:
        raise ValueError("methods must name at least one method, such as dense,paper,tome[ratio=0.5]")
    if twice := sorted({spec for spec in found if found.count(spec) > 1}):
        raise ValueError(f"{twice[0]!r} is named twice")
    return found


def method_by_name(
    spec: str, model: Any = "tiny", *, size: tuple[int, int] | None = None, steps: int = 50
) -> Candidate:
    """Return the method that ``spec`` describes.

    A name, one of `NAMES`, with changes to its fields in brackets; several joined by ``+`` are applied from left to
    right. Fields that `AtEdm` and `Matched` do not have make a `Variant`. ``cost=NAME`` in the brackets solves for the
    rate or ratio at which a run of ``model`` at ``size`` (width, height) pixels and ``steps`` costs what NAME does,
    ``cost=0.7`` for a share of the dense cost; for dense itself that is a share of the steps. What is one's own is
    imported: ``paper[rank=MODULE:NAME]``. The path of a ``plan.json`` is the plan in it. Raises a `ValueError` if a
    name or a field is unknown, a cost cannot be had, or is given beside what is solved for it.
    """
    if spec.strip().endswith(".json"):
        return Planned(read_plan(spec.strip()))
    parts = _split(spec, "+")
    if len(parts) > 1:
        stack: list[Candidate] = []
        for part in parts:  # each is solved for the steps that those before it leave
            stack.append(method_by_name(part, model, size=size, steps=steps))
            steps = stack[-1].steps_of(steps)
        return Stacked(tuple(stack))
    match = re.fullmatch(r"([\w-]+)(?:\[(.*)\])?", spec.strip())
    if match is None:
        raise ValueError(f"cannot read the method {spec!r}; write NAME or NAME[field=value,...]")
    name, fields = match[1], _fields(match[2] or "")
    check_name("method", name, NAMES)
    target = fields.pop(EQUAL_COST, None)
    candidate: Candidate
    if name in METHODS:
        is_transformer = architecture(model).is_transformer
        method = _changed(method_named(name, transformer=is_transformer), fields)
        if is_transformer and isinstance(method, Variant) and (why := method.why_no_transformer()):
            raise ValueError(f"{spec!r} is for U-Nets: {why}")
        candidate = Pruning(method)
    elif name == "tome":
        candidate = Merging(_replace(ToMe(), fields))
    else:
        candidate = _replace({"dense": Dense, "deepcache": Caching, **CACHES}[name](), fields)
    if target is None:
        return candidate
    if solved := [field for field in fields if field in SOLVED]:
        raise ValueError(f"give {solved[0]} or {EQUAL_COST} in {spec!r}, not both: a cost is solved for it")
    if isinstance(target, str):
        other = method_by_name(target, model, size=size, steps=steps)
        if not isinstance(other, Pruning | Merging):
            raise ValueError(f"cost must be a share of dense, or the name of a way to prune or of tome, not {target!r}")
        target = run_cost(model, _setting(other), size=size, steps=steps)
    if isinstance(candidate, Dense):
        return Dense(target)
    if not isinstance(candidate, Pruning | Merging):
        raise ValueError("a cost is solved for dense steps, for pruning and for ToMe")
    fitted: Any = fit_to_budget(model, _setting(candidate), share=target, size=size, steps=steps)
    return type(candidate)(fitted)


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
    """Read "field=value,...": values are JSON, or else words."""
    fields: dict[str, Any] = {}
    for pair in filter(None, _split(text, ",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"cannot read {pair!r}; write field=value")
        if key in fields:
            raise ValueError(f"{key} is given twice in [{text}]")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    return fields


def _changed(method: Method, fields: dict[str, Any]) -> Method:
    """Return a method with other fields: of its own class if that has them, else a `Variant`."""
    for field, value in fields.items():
        if isinstance(value, str) and ":" in value:
            fields[field] = imported(value)
        elif field == "where":
            check_name("where", value, WHERES)
            fields[field] = WHERES[value]
    known = {field.name for field in dataclasses.fields(method) if field.repr}  # type: ignore[arg-type]
    named = any(isinstance(value, str) for value in fields.values())  # such as a ranking, which only variants name
    if not named and fields.keys() <= known:
        return _replace(method, fields)
    for field in fields:
        check_name("field", field, known | {field.name for field in dataclasses.fields(Variant)})
    return _replace(variant_of(method), fields)


def imported(name: str) -> Any:
    """Import something of one's own by MODULE:NAME; the current folder is looked in too.

    Raises a `ValueError` if there is none.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # Python itself does so for a script
        sys.path.insert(0, here)
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {name!r}, read as MODULE:NAME: {error}") from error


def _replace(default: T, fields: dict[str, Any]) -> T:
    for key in fields:
        check_name("field", key, [field.name for field in dataclasses.fields(default)])  # type: ignore[arg-type]
    return dataclasses.replace(default, **fields)  # type: ignore[type-var]


def _setting(candidate: Pruning | Merging) -> Method | ToMe:
    return candidate.method if isinstance(candidate, Pruning) else candidate.tome
