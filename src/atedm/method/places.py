"""Which spans a method prunes: predicates of a `atedm.method.contract.Place`."""

from __future__ import annotations

from atedm.method.contract import Place, Where


def everywhere(place: Place) -> bool:
    """Prune every span: the paper's AT-EDM."""
    return True


def not_second_level(place: Place) -> bool:
    """Prune all but the second feature level: the paper's AT-EDM†."""
    return place.level != 2


def only_second_level(place: Place) -> bool:
    """Prune the second feature level alone: what AT-EDM does and AT-EDM† does not."""
    return place.level == 2


#: The predicates that have a name.
WHERES: dict[str, Where] = {
    "everywhere": everywhere,
    "not-second-level": not_second_level,
    "only-second-level": only_second_level,
}


def where_name(where: Where) -> str:
    """Return the name of a predicate; of one's own, its module and qualified name."""
    return next((name for name, known in WHERES.items() if known is where), function_name(where))


def function_name(function: object) -> str:
    """Return the module and the qualified name of a function, or what it prints as where it has none."""
    name = getattr(function, "__qualname__", None)
    return f"{getattr(function, '__module__', '')}.{name}" if name else repr(function)
