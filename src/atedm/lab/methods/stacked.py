"""Several methods at once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any

from atedm.lab.methods.candidates import Candidate, Pruning
from atedm.lab.methods.peers import Caching, Merging


@dataclass(frozen=True)
class Stacked(Candidate):
    """Several candidates at once, the first one applied first.

    Raises a `ValueError` if there are two of a kind, something after caching, which wraps what it finds, or both ToMe
    and pruning: ToMe merges over a whole grid, which pruning takes apart.
    """

    parts: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        kinds = [type(part) for part in self.parts]
        if {Pruning, Merging} <= set(kinds):
            raise ValueError(
                "ToMe and pruning do not go together: ToMe merges over a whole grid of tokens, which pruning takes "
                "apart; stack either with deepcache or fewer steps"
            )
        if len(set(kinds)) < len(kinds):
            raise ValueError("two methods of one kind do not stack; each changes the same part of the model")
        after_caching = kinds[kinds.index(Caching) + 1 :] if Caching in kinds else []
        if {Pruning, Merging} & set(after_caching):
            raise ValueError("deepcache comes last in a stack, because it wraps what it finds, as in matched+deepcache")

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The kinds of its parts."""
        return " + ".join(part.kind for part in self.parts)

    @property
    def cycle(self) -> int:  # type: ignore[override]
        """Steps after which all parts repeat themselves."""
        return lcm(*(part.cycle for part in self.parts))

    @contextmanager
    def applied(self, pipe: Any, seed: int = 0) -> Iterator[None]:
        """Apply all of them."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.applied(pipe, seed))
            yield

    def steps_of(self, steps: int) -> int:
        """Return what is left of ``steps`` after all of them."""
        for part in self.parts:
            steps = part.steps_of(steps)
        return steps

    def as_dict(self) -> dict[str, Any]:
        """Return what each of them says."""
        return {"kind": "stacked", "methods": [part.as_dict() for part in self.parts]}
