"""What to prune and how: one frozen, validated config, and the paper's settings by name."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from atedm.choices import (
    BY_SIMILARITY,
    COPY_MAPS,
    COVERS,
    GUIDANCE_MASKS,
    PLACES,
    RANKINGS,
    RECOVERIES,
    SIMILARITIES,
    WHERES,
    Where,
    check_name,
)
from atedm.ranking import HEAD_FUSIONS, ITERATIONS
from atedm.schedule import PAIRINGS, SCHEDULES, BlockPlace


@dataclass(frozen=True)
class PruningConfig:
    """How tokens are pruned. The defaults are the paper's setting, so that ``pruning_rate`` is the one slider.

        >>> PruningConfig(pruning_rate=0.5).rates
        ((0, 0.5),)

    Raises:
        ValueError: If a value is out of its range or a name unknown; the message names the nearest known one.
    """

    #: Share of the tokens dropped in a block, in [0, 1). The paper's 0.63 keeps 37 % (supplement A.3).
    pruning_rate: float = 0.63
    #: Several pruning layers in place of one: (layer, rate) pairs, layers counted from 0, each rate a share of the
    #: tokens that reach it (supplement A.2). Empty means ``pruning_rate`` in the first layer. A block with nothing left
    #: to run on fewer tokens after one of them passes that one over.
    gradual: tuple[tuple[int, float], ...] = ()
    #: Where in the layer tokens are dropped, one of `PLACES`. Blocks of one layer gain only inside it.
    place: str = "after-feed-forward"
    #: Which blocks: a name in `WHERES` or a predicate of a `BlockPlace`.
    where: str | Where = "everywhere"
    #: One of `RANKINGS`.
    ranking: str = "self-attention"
    #: How heads are joined, one of `HEAD_FUSIONS`.
    head_fusion: str = "rms"
    #: Iterations of G-WPR: a fixed count, or the cap where ``tolerance`` is set.
    iterations: int = ITERATIONS
    #: Stop once importance moves less than this. Waits for the device in every iteration; None never does.
    tolerance: float | None = None
    #: Threshold of the two clip mappings (supplement Eq. 2, 3).
    eta: float = 0.2
    #: Factor on the exponent of the power mapping (supplement Eq. 4).
    alpha: float = 5.0
    #: Factor on the base of the power mapping; None is half the number of keys.
    beta: float | None = None
    #: One of `RECOVERIES`.
    recovery: str = "similarity-copy"
    #: What refills from other tokens go by, one of `SIMILARITIES`.
    similarity: str = "attention"
    #: How far along either side of the grid a match by features is looked for; None is everywhere.
    match_window: int | None = None
    #: Share of the kept tokens that cover in the "representative" ranking; the others are those least like the cover.
    cover_share: float = 0.4
    #: Whether kept tokens go on as the mean of themselves and those that match them, in a matched update.
    merge: bool = False
    #: Whether later self-attention counts a kept token as often as there are tokens that match it (Bolya et al., Token
    #: Merging, ICLR 2023): the logarithm of their number is added to its logits.
    proportional_attention: bool = False
    #: Share of the kept tokens that are the most important by self-attention, where ``ranking`` chooses the others.
    importance_share: float = 0.0
    #: One of `COPY_MAPS`; they differ where the first pruning layer is not the only one or not the block's first.
    copy_map: str = "own"
    #: One of `GUIDANCE_MASKS`. "shared" averages importance over the two halves of the batch, which is where diffusers
    #: puts the image without and with its prompt, so it is for guided runs only.
    guidance_masks: str = "separate"
    #: When some blocks are spared, one of `SCHEDULES`.
    schedule: str = "prune-less-early"
    #: Share of the run at which the schedule changes over: 15 of 50 steps.
    prune_less_share: float = 0.3
    #: Which block of each down and up stage is spared in prune-less steps, one of `PAIRINGS`.
    unpruned_blocks: str = "F-L"
    #: Seed of the uniform random ranking.
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        _check_rate("pruning_rate", self.pruning_rate)
        object.__setattr__(self, "gradual", _checked_gradual(self.gradual))
        if isinstance(self.where, str):
            check_name("where", self.where, WHERES)
        elif not callable(self.where):
            raise ValueError(f"where must be a name or a predicate of a BlockPlace, not {self.where!r}")
        check_name("place", self.place, PLACES)
        check_name("ranking", self.ranking, RANKINGS)
        check_name("head_fusion", self.head_fusion, HEAD_FUSIONS)
        check_name("recovery", self.recovery, RECOVERIES)
        check_name("similarity", self.similarity, SIMILARITIES)
        self._check_combinations()
        check_name("copy_map", self.copy_map, COPY_MAPS)
        check_name("guidance_masks", self.guidance_masks, GUIDANCE_MASKS)
        check_name("schedule", self.schedule, SCHEDULES)
        check_name("unpruned_blocks", self.unpruned_blocks, PAIRINGS)
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations must be a whole number of at least 1, not {self.iterations!r}")
        for name in ("tolerance", "beta"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0 or None, not {value!r}")
        for name in ("eta", "alpha"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)!r}")
        if not (_is_number(self.prune_less_share) and 0 <= self.prune_less_share <= 1):
            raise ValueError(f"prune_less_share must be in [0, 1], not {self.prune_less_share!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, not {self.seed!r}")

    def _check_combinations(self) -> None:
        """Check what goes together."""
        by_grid = {"bicubic recovery": self.recovery == "bicubic", f"ranking {self.ranking!r}": self.ranking in COVERS}
        by_grid["similarity 'distance'"] = self.similarity == "distance" and self.recovery in BY_SIMILARITY
        by_grid["match_window"] = self.match_window is not None
        for what, is_asked in by_grid.items():
            if is_asked and len(self.gradual) > 1:
                raise ValueError(f"{what} needs a whole grid of tokens, so it allows one pruning layer a block")
        if self.recovery == "weighted-update" and self.matches_by_features:
            raise ValueError(f"weighted-update weighs by attention or by distance, not by {self.similarity!r}")
        if self.match_window is not None:
            if isinstance(self.match_window, bool) or not isinstance(self.match_window, int) or self.match_window < 1:
                raise ValueError(f"match_window must be a whole number of at least 1, not {self.match_window!r}")
            if self.similarity not in ("cosine", "euclidean"):
                raise ValueError(f"match_window is for matches by features, not by {self.similarity}")
        for name in ("importance_share", "cover_share"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)!r}")
        if self.merge and self.recovery != "matched-update":
            raise ValueError(f"merge is undone by recovery 'matched-update' alone, not by {self.recovery!r}")
        if self.proportional_attention and self.recovery not in ("similarity-copy", "matched-update"):
            raise ValueError(f"proportional_attention needs matches, which recovery {self.recovery!r} does without")

    @classmethod
    def for_budget(
        cls,
        model: Any,
        *,
        share: float | None = None,
        tmacs: float | None = None,
        config: PruningConfig | str = "paper",
        size: tuple[int, int] | None = None,
        guidance: bool | None = None,
        of: str = "mean",
        steps: int = 50,
        convention: str = "exact",
    ) -> PruningConfig:
        """Return ``config`` with the least pruning rate that keeps to a budget for the whole U-Net.

            >>> PruningConfig.for_budget("sdxl", tmacs=4.1, of="normal-step", convention="paper").pruning_rate
            0.617...

        Args:
            model: "sdxl", "sdxl-turbo", "sd15", "sd21", "tiny", a folder, a hub id, a pipeline or a U-Net. No weights
                are read.
            share: The budget as a share of the dense cost.
            tmacs: Or in T MACs a step for one image.
            config: What to prune and how, or the name of a preset.
            size: (width, height) in pixels; by default what the model was trained for.
            guidance: Whether an image takes two halves of a U-Net call; by default what suits the model.
            of: What the budget is for: the "mean" step of a run, or a "normal-step", as the paper's figures are.
            steps: Steps of the run.
            convention: "exact", overheads counted, or "paper", its own way to count.

        Raises:
            TypeError: If there is no U-Net.
            ValueError: If the budget cannot be kept; the message names the floor.
        """
        from atedm.costs.fit import fit_to_budget  # builds the U-Net, which this module knows nothing of

        fitted = fit_to_budget(
            model,
            preset(config) if isinstance(config, str) else config,
            share=share,
            tmacs=tmacs,
            size=size,
            guidance=guidance,
            of=of,
            steps=steps,
            convention=convention,
        )
        assert isinstance(fitted, PruningConfig)
        return fitted

    @property
    def method_name(self) -> str:
        """What to call it over a picture: the paper's method by its name, our own by its own."""
        return "Matched pruning" if self.recovery in ("matched-update", "weighted-update") else "AT-EDM"

    @property
    def rates(self) -> tuple[tuple[int, float], ...]:
        """(layer, rate) of every pruning layer."""
        return self.gradual or ((0, self.pruning_rate),)

    def rates_in(self, layers: int) -> tuple[tuple[int, float], ...]:
        """Return the ``rates`` of a block of so many layers: those after which something runs on fewer tokens."""
        end = layers - (self.place == "after-feed-forward")
        return tuple((layer, rate) for layer, rate in self.rates if layer < end)

    @property
    def opens_layer(self) -> bool:
        """Whether the pruning layer is run part by part, because something is done or needed between its parts."""
        if self.place == "before-self-attention":
            return False
        return self.place != "after-feed-forward" or self.ranking.startswith("cross-attention")

    @property
    def ranks_by_self_attention(self) -> bool:
        """Whether G-WPR runs on the self-attention map, for the whole ranking or for a part of it."""
        by_rank = self.ranking in ("self-attention", "self-attention-reversed", "important-of-cells")
        return by_rank or self.importance_share > 0

    @property
    def needs_attention_map(self) -> bool:
        """Whether a pruning layer needs its own self-attention map, for the ranking or for the copy."""
        copies_by_own = self.copies_by_attention and self.copy_map == "own"
        return copies_by_own or self.ranks_by_self_attention or self.ranking == "attention-received"

    @property
    def needs_first_map(self) -> bool:
        """Whether copies go by the map of the block's first layer, made apart from what pruning layers need."""
        return self.copies_by_attention and self.copy_map == "first"

    @property
    def copies_by_attention(self) -> bool:
        """Whether dropped tokens are refilled from where the self-attention map says."""
        return self.recovery in BY_SIMILARITY and self.similarity.startswith("attention")

    @property
    def matches_by_features(self) -> bool:
        """Whether dropped tokens are refilled from the kept token of the most similar features."""
        return self.recovery in BY_SIMILARITY and self.similarity in ("cosine", "euclidean")

    def prunes(self, block: BlockPlace) -> bool:
        """Whether ``where`` names this block."""
        where = WHERES[self.where] if isinstance(self.where, str) else self.where
        return bool(where(block))

    def replace(self, **changes: Any) -> PruningConfig:
        """Return the same config with some fields changed, checked like a new one."""
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        for name in sorted(unknown):
            check_name("field", name, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; a predicate becomes its qualified name, if it has one."""
        fields = dataclasses.asdict(self)
        if not isinstance(self.where, str):
            name = getattr(self.where, "__qualname__", None)
            fields["where"] = f"{self.where.__module__}.{name}" if name else repr(self.where)
        fields["gradual"] = [list(pair) for pair in self.gradual]
        return fields


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rate(what: str, rate: object) -> None:
    if not (_is_number(rate) and 0 <= rate < 1):  # type: ignore[operator]
        raise ValueError(f"{what} must be in [0, 1), the share of tokens to drop, not {rate!r}")


def _checked_gradual(gradual: object) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((layer, rate) for layer, rate in gradual)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"gradual must be (layer, rate) pairs, not {gradual!r}") from None
    for layer, rate in pairs:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"a layer of gradual must be a whole number from 0, not {layer!r}")
        _check_rate("a rate of gradual", rate)
    if any(a[0] >= b[0] for a, b in itertools.pairwise(pairs)):
        raise ValueError(f"the layers of gradual must ascend, each once: {pairs}")
    return pairs


#: The paper's settings by name: AT-EDM, AT-EDM† (no pruning at the second feature level), and the setting for
#: SDXL-Turbo, which is AT-EDM† in every step because there are too few to tell early from late (supplement E). And our
#: own, matched pruning: whole blocks on tokens that represent the others, refilled by the updates of their matches.
PRESETS: dict[str, PruningConfig] = {
    "paper": PruningConfig(),
    "dagger": PruningConfig(where="not-second-level"),
    "turbo": PruningConfig(where="not-second-level", schedule="constant"),
    "matched": PruningConfig(
        ranking="representative",
        recovery="matched-update",
        similarity="euclidean",
        merge=True,
        proportional_attention=True,
        place="before-self-attention",
        schedule="constant",
    ),
}


def preset(name: str) -> PruningConfig:
    """Return the setting called ``name``.

    Raises:
        ValueError: If there is none; the message names the nearest one.
    """
    check_name("preset", name, PRESETS)
    return PRESETS[name]
