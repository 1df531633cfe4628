"""The contract between a method and a host.

A host knows one family of models. It finds the spans of a model, which are runs of layers over one set of tokens (an
attention block of a U-Net, a stretch of blocks of a transformer). For each span it asks the method how many tokens to
keep, runs the first ``dense_layers`` layers on all tokens, lets the method drop tokens, runs the other layers on what
is left, and refills. A method knows tensors and nothing of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a span sits in its model.

    Raises:
        ValueError: If a field is out of its range.
    """

    #: Part of the model: "down", "mid" or "up" in a U-Net, "mid" in a transformer.
    stage: str
    #: Feature level, counted from 1, the finest. A transformer has one.
    level: int
    #: Number of this span among those of its stage and level, from 0, in the order they run.
    index: int
    #: How many spans its stage and level have.
    count: int
    #: How many layers the span has, such as 2 (A2) or 10 (A10) in SDXL.
    layers: int
    #: Name of the module in the model; of a run of blocks, ``transformer_blocks[1:23]``.
    name: str

    @property
    def is_stretch(self) -> bool:
        """Whether it is a run of blocks of a transformer, and not one block with layers of its own."""
        return self.name.endswith("]")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.stage not in ("down", "mid", "up"):
            raise ValueError(f"stage must be 'down', 'mid' or 'up', not {self.stage!r}")
        if self.level < 1 or self.layers < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"level and layers must be at least 1 and index below count: {self}")


#: Says of each span whether it may be pruned.
Where: TypeAlias = Callable[[Place], bool]


class QueriesAndKeys(NamedTuple):
    """What an attention layer compares: ``q`` (B, H, M, D), ``k`` (B, H, N, D), and the factor on their product."""

    q: Tensor
    k: Tensor
    scale: float


@dataclass
class Memory:
    """What a span remembers from one step of a run for the next. The host clears it between runs."""

    #: Whatever the method stored in the step before; None if there was none, or the span did not prune in it.
    last: Any = None
    #: Whether it was stored in this step.
    is_new: bool = False

    def store(self, value: Any) -> None:
        """Keep ``value`` for the next step."""
        self.last, self.is_new = value, True

    def begin_step(self, *, follows: bool) -> None:
        """Forget what is older than the last step, or everything if this step does not follow the last one."""
        if not (follows and self.is_new):
            self.last = None
        self.is_new = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model, pickled or not, starts with nothing.
        return vars(Memory())


@dataclass(frozen=True)
class View:
    """What a method may ask about a span in one step.

    Queries and keys are functions, because they are only computed if a method needs them.
    """

    place: Place
    #: (h, w) of the grid of tokens, N = h w in raster order. The frames of a video lie below one another.
    size: tuple[int, int]
    #: K, how many tokens will go on.
    count: int
    #: Index of the denoising step, from 0. A tensor without dimensions where the model may be compiled or exported.
    step: int | Tensor
    #: Tokens at the point of pruning, (B, N, C), any floating dtype.
    tokens: Tensor
    #: Queries and keys of the span's first self-attention.
    self_attention: Callable[[], QueriesAndKeys]
    #: Queries of its tokens and keys of the words.
    cross_attention: Callable[[], QueriesAndKeys]
    #: (N,) zeros and ones: tokens that must not be dropped; None where nothing is protected.
    protected: Tensor | None = None
    #: For methods that remember.
    memory: Memory | None = None
    #: Whether all images of the batch must keep the same tokens, because their positions come in one table for all.
    one_set: bool = False


class Cut(NamedTuple):
    """What dropping tokens gives."""

    #: (B, K, C): what the span goes on with.
    tokens: Tensor
    #: (B, K) int64, ascending: which tokens they are.
    keep: Tensor
    #: (B, N) float32: what they were chosen by.
    importance: Tensor
    #: Gives (B, N, C) from the tokens (B, K, C) after the last layer of the span.
    refill: Callable[[Tensor], Tensor]
    #: (B, K) float32: how many tokens each one stands for in self-attention; None is one each.
    weights: Tensor | None = None


@runtime_checkable
class Method(Protocol):
    """A way to prune. `atedm.method.at_edm.AtEdm` and `atedm.method.matched.Matched` are two.

    A method that remembers may also have ``remember_dense(before, after, memory)``, which is told of a span that ran
    dense: (B, N, C) tokens before and after it.
    """

    @property
    def rate(self) -> float:
        """Share of the tokens that are dropped, in [0, 1): the slider."""
        ...

    @property
    def name(self) -> str:
        """What to call it in a table or over a picture."""
        ...

    @property
    def dense_layers(self) -> int:
        """How many layers of a span run on all tokens before some are dropped."""
        ...

    @property
    def remembers(self) -> bool:
        """Whether it stores anything in `View.memory`."""
        ...

    def is_early(self, share: float) -> bool:
        """Whether a step counts as early, given the share of the run that is done before it, in [0, 1)."""
        ...

    def count(self, place: Place, tokens: int, *, early: bool = False) -> int:
        """Tokens of a span that go on; all of them if the span is not pruned in such a step."""
        ...

    def drop(self, view: View) -> Cut:
        """Choose ``view.count`` of ``view.tokens``, and prepare to refill the others."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        ...
