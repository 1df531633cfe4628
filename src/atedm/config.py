"""What to prune and how: one frozen, validated config, and the paper's settings by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from atedm.checks import check_config, checked_pairs
from atedm.choices import AUTO_FULL_TOKENS, BY_SIMILARITY, OWN_FIELDS, UPDATES, WHERES, Own, Where, check_name, name_of
from atedm.pruning import keep_count
from atedm.ranking import ITERATIONS
from atedm.schedule import BlockPlace, prune_less_blocks


@dataclass(frozen=True)
class PruningConfig:
    """How tokens are pruned. The defaults are the paper's setting, so that ``pruning_rate`` is the one slider.

    To the letter they are that up to 1,024 tokens a block; above, ``map_mode`` takes a sample of the attention map.

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
    #: What rates are multiplied by in the blocks of a feature level: (level, factor) pairs, levels counted from 1, the
    #: finest, factors in [0, 1].
    level_factors: tuple[tuple[int, float], ...] = ()
    #: Where in the layer tokens are dropped, one of `PLACES`. Blocks of one layer gain only inside it.
    place: str = "after-feed-forward"
    #: Which blocks: a name in `WHERES` or a predicate of a `BlockPlace`.
    where: str | Where = "everywhere"
    #: One of `RANKINGS`, or a function of a `ToRank`.
    ranking: str | Own = "self-attention"
    #: How heads are joined, one of `HEAD_FUSIONS`.
    head_fusion: str = "rms"
    #: Iterations of G-WPR: a fixed count, or the cap where ``tolerance`` is set.
    iterations: int = ITERATIONS
    #: Stop once importance moves less than this. Waits for the device in every iteration; None never does.
    tolerance: float | None = None
    #: Threshold of the two clip mappings (supplement Eq. 2, 3).
    eta: float = 0.2
    #: How self-attention is ranked and copied by, one of `MAP_MODES`; what needs a whole map is given one. Or a
    #: function with the arguments of `atedm.map_modes.scores_in_blocks`.
    map_mode: str | Own = "auto"
    #: Queries whose rows stand for the whole map in the "sampled" mode, which "auto" is above `AUTO_FULL_TOKENS`.
    sampled_rows: int = 256
    #: Factor on the exponent of the power mapping (supplement Eq. 4).
    alpha: float = 5.0
    #: Factor on the base of the power mapping; None is half the number of keys.
    beta: float | None = None
    #: One of `RECOVERIES`, or a function of a `ToRefill`.
    recovery: str | Own = "similarity-copy"
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
    #: puts the image without and with its prompt, so it is for runs that are guided to their end, and for no other
    #: kind of guidance.
    guidance_masks: str = "separate"
    #: When some blocks are spared, one of `SCHEDULES`, or a function of the share of the run that is done.
    schedule: str | Own = "prune-less-early"
    #: Share of the run at which the schedule changes over: 15 of 50 steps.
    prune_less_share: float = 0.3
    #: Which block of each down and up stage is spared in prune-less steps, one of `PAIRINGS`.
    unpruned_blocks: str = "F-L"
    #: Prune less by a lower rate everywhere: what rates are multiplied by in prune-less steps, in [0, 1]. None spares
    #: some blocks and leaves the others as they are, as the paper does.
    prune_less_factor: float | None = None
    #: For how many steps of a run a block keeps its choice of tokens (supplement F, 2). 1 chooses anew in every step.
    refresh_every: int = 1
    #: Where tokens are dropped in steps that go by a choice made before, one of `PLACES`; None is ``place``.
    reuse_place: str | None = None
    #: Whether such steps match the dropped tokens to the kept ones anew, by features.
    rematch: bool = False
    #: How much of what set a token's update apart from its group's in the last step a matched update adds, in [0, 1].
    own_update_share: float = 0.0
    #: Seed of the uniform random ranking.
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("gradual", "level_factors"):
            object.__setattr__(self, name, checked_pairs(name, getattr(self, name)))
        check_config(self)

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
        return "Matched pruning" if self.recovery in UPDATES else "AT-EDM"

    @property
    def rates(self) -> tuple[tuple[int, float], ...]:
        """(layer, rate) of every pruning layer."""
        return self.gradual or ((0, self.pruning_rate),)

    def rates_in(self, block: BlockPlace, *, prune_less: bool = False) -> tuple[tuple[int, float], ...]:
        """Return the ``rates`` in one block: those after which something runs on fewer tokens, times its factors."""
        factor = dict(self.level_factors).get(block.level, 1.0)
        if prune_less and self.prune_less_factor is not None:
            factor *= self.prune_less_factor
        end = block.layers - (self.place == "after-feed-forward")
        return tuple((layer, factor * rate) for layer, rate in self.rates if layer < end)

    def tokens_left(self, block: BlockPlace, tokens: int, *, prune_less: bool = False) -> dict[int, int]:
        """Tokens left after each layer of a block of so many that drops any, by layer."""
        counts: dict[int, int] = {}
        for layer, rate in self.rates_in(block, prune_less=prune_less):
            left = keep_count(tokens, rate)
            if left < tokens:
                tokens = counts[layer] = left
        return counts

    def spared(self, blocks: Iterable[BlockPlace]) -> frozenset[str]:
        """Names of those among all attention blocks of a U-Net that prune-less steps leave alone."""
        if self.schedule == "constant" or self.prune_less_factor is not None:
            return frozenset()
        return prune_less_blocks(blocks, self.unpruned_blocks)

    @property
    def opens_layer(self) -> bool:
        """Whether the pruning layer is run part by part, because something is done or needed between its parts."""
        places = {self.place, self.place_of_reuse}
        ranks_inside = self.place == "after-feed-forward" and self.ranks_by_words
        return ranks_inside or not places <= {"before-self-attention", "after-feed-forward"}

    @property
    def place_of_reuse(self) -> str:
        """Where tokens are dropped in steps that go by a choice made before."""
        return self.reuse_place or self.place

    @property
    def remembers_updates(self) -> bool:
        """Whether the update of every token is kept for the next step."""
        return self.recovery == "last-update" or self.own_update_share > 0

    @property
    def own_functions(self) -> tuple[str, ...]:
        """Fields that hold a function of the user's own, whose arithmetic no formula knows."""
        return tuple(name for name in OWN_FIELDS if name != "schedule" and callable(getattr(self, name)))

    @property
    def ranks_by_words(self) -> bool:
        """Whether a mapping of cross-attention ranks."""
        return isinstance(self.ranking, str) and self.ranking.startswith("cross-attention")

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

    def map_mode_for(self, tokens: int) -> str | Own:
        """Return ``map_mode``, "auto" decided for so many tokens, but "full" where nothing else gives what is asked."""
        by_size = "sampled" if tokens > AUTO_FULL_TOKENS else "full"
        return "full" if self.needs_whole_map else by_size if self.map_mode == "auto" else self.map_mode

    @property
    def needs_whole_map(self) -> bool:
        """Whether something is asked for that no map mode but "full" gives."""
        weighs = self.recovery == "weighted-update" or self.similarity == "attention-transposed"
        return self.tolerance is not None or (self.copies_by_attention and weighs)

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
        """Return the fields as plain JSON values; a function becomes its qualified name, if it has one."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("where", *OWN_FIELDS):
            if callable(value := getattr(self, name)):
                fields[name] = name_of(value)
        for name in ("gradual", "level_factors"):
            fields[name] = [list(pair) for pair in getattr(self, name)]
        return fields


_MATCHED = PruningConfig(
    pruning_rate=0.7,
    level_factors=((2, 0.8),),
    ranking="representative",
    recovery="matched-update",
    similarity="euclidean",
    merge=True,
    proportional_attention=True,
    place="before-self-attention",
    schedule="constant",
    own_update_share=0.5,
)

#: The paper's settings by name: AT-EDM, AT-EDM† (no pruning at the second feature level), and one for SDXL-Turbo,
#: AT-EDM† in every step. Supplement E says only what that saves, 33.4 %; this is what comes to it. And our own, matched
#: pruning: whole blocks on tokens that represent the others, refilled by the updates of their matches. "matched-deep"
#: is for rates that leave the third level of a small image too little to spare the second.
PRESETS: dict[str, PruningConfig] = {
    "paper": PruningConfig(),
    "dagger": PruningConfig(where="not-second-level"),
    "turbo": PruningConfig(where="not-second-level", schedule="constant"),
    "matched": _MATCHED,
    "matched-deep": _MATCHED.replace(
        pruning_rate=0.85, level_factors=((2, 0.95),), cover_share=0.7, own_update_share=0.7
    ),
}


def preset(name: str) -> PruningConfig:
    """Return the setting called ``name``.

    Raises:
        ValueError: If there is none; the message names the nearest one.
    """
    check_name("preset", name, PRESETS)
    return PRESETS[name]
