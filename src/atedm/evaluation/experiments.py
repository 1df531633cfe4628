"""The paper's tables and ablations as lists of methods, one experiment a name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atedm.config import PruningConfig
from atedm.schedule import PAIRINGS

#: Guidance scales of the paper's FID-CLIP curves (supplement Fig. 5).
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0, 12.0, 15.0)

#: Pruning rates at which a normal step of SDXL at 1024 px costs the paper's 2.9, 3.6, 4.1 and 4.52 T MACs, in its own
#: convention: ``atedm cost --tmacs 2.9 --of normal-step --convention paper``. The paper states the third.
BUDGETS = {"a": 0.934, "b": 0.746, "c": 0.63, "d": 0.513}


@dataclass(frozen=True)
class Experiment:
    """Methods to hold against each other, under one or several settings."""

    title: str
    #: What it reproduces.
    source: str
    #: Methods by label, as `atedm.evaluation.methods_by_name` reads them.
    methods: dict[str, str]
    #: Guidance scales; empty for the one asked for.
    guidance: tuple[float, ...] = ()
    #: Numbers of steps; empty for the one asked for.
    steps: tuple[int, ...] = ()
    #: Whether its chart joins methods of one kind by a line, because they differ in their cost alone.
    joins_kinds: bool = False


def only_as_asked(experiment: Experiment, steps: int | None = None, guidance: float | None = None) -> Experiment:
    """Return the experiment under the setting that was asked for alone, where it would vary it."""
    if steps is not None and experiment.steps:
        experiment = replace(experiment, steps=(steps,))
    if guidance is not None and experiment.guidance:
        experiment = replace(experiment, guidance=(guidance,))
    return experiment


def results_name(
    experiment: str,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    dtype: str | None = None,
) -> str:
    """Return what results are called, so that those of one setting do not take the place of another's.

    Args:
        experiment: Its name.
        steps: Denoising steps, where they were asked for.
        guidance: Guidance scale, where it was asked for.
        size: (width, height) in pixels, where it was asked for.
        dtype: Where it was asked for.
    """
    parts = [experiment]
    if steps is not None:
        parts.append(f"{steps}-step" + "s" * (steps > 1))
    if guidance is not None:
        parts.append(f"guidance-{guidance:g}")
    if size is not None:
        parts.append(f"{size[0]}x{size[1]}")
    if dtype is not None:
        parts.append(dtype)
    return "-".join(parts)


def _paper(changes: str) -> str:
    return f"paper[{changes}]"


def _budgets() -> dict[str, str]:
    methods = {"dense": "dense"}
    for name, rate in BUDGETS.items():
        # Written alike wherever it comes, so that experiments share its images.
        ours = "paper" if rate == PruningConfig().pruning_rate else _paper(f"pruning_rate={rate}")
        methods[f"AT-EDM-{name}"] = ours
        methods[f"ToMe-{name}"] = f"tome[cost={ours}]"
        methods[f"ToMe-{name}, DSAP"] = f"tome[prune_less_share=0.3,cost={ours}]"
        methods[f"matched-{name}"] = f"matched[cost={ours}]"
    dagger = {"AT-EDM†": "dagger", "ToMe at †": "tome[cost=dagger]", "matched at †": "matched[cost=dagger]"}
    return methods | dagger


def _pareto() -> dict[str, str]:
    """Every method at every cost; what is out of reach is left out when it is run."""
    methods = {"dense": "dense"}
    for cost in (0.85, 0.75, 0.65, 0.55, 0.45, 0.35):
        for label, name in (("fewer steps", "dense"), ("AT-EDM", "paper"), ("ToMe", "tome"), ("matched", "matched")):
            methods[f"{label} {cost}"] = f"{name}[cost={cost}]"
    methods["matched 0.5"] = "matched[cost=0.5]"  # half of dense, for what a user would ask first
    for cost in (0.55, 0.5, 0.45):
        methods[f"matched-deep {cost}"] = f"matched-deep[cost={cost}]"
    caching = {f"DeepCache {n}": f"deepcache[interval={n}]" for n in (2, 3, 5)}
    stacked = {f"matched + DeepCache {n}": f"matched[pruning_rate=0.4]+deepcache[interval={n}]" for n in (2, 3)}
    return methods | caching | stacked


def _matched() -> dict[str, str]:
    """The matched preset with one part changed at a time, at the cost of the whole."""

    def changed(changes: str) -> str:
        return f"matched[{changes},cost=matched]"

    return {
        "dense": "dense",
        "matched": "matched",
        "kept by G-WPR": changed("ranking=self-attention"),
        "kept at random": changed("ranking=uniform-random"),
        "kept by cells": changed("ranking=cells"),
        "kept by importance in cells": changed("ranking=important-of-cells"),
        "kept by lattice": changed("ranking=lattice"),
        "kept by facility location": changed("ranking=facility-location"),
        "a fifth by G-WPR": changed("importance_share=0.2"),
        "copied": changed("recovery=similarity-copy,merge=false,own_update_share=0"),
        "update weighted by distance": changed(
            "recovery=weighted-update,similarity=distance,merge=false,proportional_attention=false,own_update_share=0"
        ),
        "no own update": changed("own_update_share=0"),
        "own update alone": changed("recovery=last-update,own_update_share=0"),
        "match by cosine": changed("similarity=cosine"),
        "match by attention": changed("similarity=attention"),
        "match by place": changed("similarity=distance"),
        "match within 4": changed("match_window=4"),
        "not merged": changed("merge=false"),
        "attention does not count": changed("proportional_attention=false"),
        "neither": changed("merge=false,proportional_attention=false"),
        "after the first layer": changed("place=after-feed-forward"),
        "after self-attention": changed("place=after-self-attention"),
        "one rate for all levels": changed("level_factors=[]"),
        "less early": changed("schedule=prune-less-early"),
        "more early": changed("schedule=prune-more-early"),
        "less early, everywhere": changed("schedule=prune-less-early,prune_less_factor=0.7"),
        "a choice for 2 steps": changed("refresh_every=2"),
        "a choice for 5 steps": changed("refresh_every=5"),
        "not the second level": changed("where=not-second-level"),
    }


_BASE = {"dense": "dense", "paper": "paper"}

EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment("AT-EDM and ToMe at equal mean cost", "Table 1, Fig. 7", _budgets(), joins_kinds=True),
    "curve": Experiment(
        "FID against CLIP score over guidance scales",
        "supplement Fig. 5",
        {**_BASE, "dagger": "dagger", "ToMe": "tome[cost=paper]", "matched": "matched[cost=paper]"},
        guidance=GUIDANCE_SCALES,
    ),
    "place": Experiment(
        "Where in the layer tokens are dropped",
        "supplement C.1, Fig. 8",
        {**_BASE, **{name: _paper(f"place={name}") for name in ("before-feed-forward", "after-self-attention")}},
    ),
    "rankings": Experiment(
        "What the ranking goes by, mappings of cross-attention among them",
        "supplement C.2, Fig. 9",
        {
            **_BASE,
            **{
                name: _paper(f"ranking={name}")
                for name in (
                    "cross-attention-entropy",
                    "cross-attention-power",
                    "cross-attention-soft-clip",
                    "cross-attention-hard-clip",
                    "attention-received",
                    "uniform-random",
                )
            },
        },
    ),
    "blocks": Experiment(
        "Which blocks prune-less steps spare",
        "supplement C.3, Fig. 10",
        {
            "dense": "dense",
            "F-L": "paper",
            **{name: _paper(f"unpruned_blocks={name}") for name in PAIRINGS if name != "F-L"},
        },
    ),
    "early": Experiment(
        "Prune less early, more early, or always alike, at equal mean cost",
        "supplement C.5, Fig. 11",
        {
            **_BASE,
            **{name: _paper(f"schedule={name},cost=paper") for name in ("prune-more-early", "constant")},
        },
    ),
    "recovery": Experiment(
        "How dropped tokens are refilled",
        "supplement A.6",
        {
            **_BASE,
            **{name: _paper(f"recovery={name}") for name in ("zero-padding", "bicubic", "direct-copy")},
            "copy by cosine": _paper("similarity=cosine"),
        },
    ),
    "prune-less-steps": Experiment(
        "How many steps prune less, at equal mean cost",
        "supplement C.4",
        {
            **_BASE,
            **{f"{share:.0%}": _paper(f"prune_less_share={share},cost=paper") for share in (0.0, 0.1, 0.2, 0.5)},
        },
    ),
    "reuse": Experiment(
        "A choice of tokens kept for several steps, at equal mean cost",
        "supplement F(2)",
        {
            "dense": "dense",
            "AT-EDM†": "dagger",
            **{f"kept for {n} steps": f"dagger[refresh_every={n},cost=dagger]" for n in (2, 5)},
            **{
                f"kept for {n}, whole blocks where reused": (
                    f"dagger[refresh_every={n},reuse_place=before-self-attention,cost=dagger]"
                )
                for n in (2, 5)
            },
        },
    ),
    "few-steps": Experiment(
        "On top of few-step sampling",
        "supplement E",
        {
            "dense": "dense",
            "turbo": "turbo",
            "paper": "paper",
            "ToMe": "tome[cost=turbo]",
            "matched": "matched[cost=turbo]",
        },
        steps=(1, 2, 4, 8),
    ),
    "stacking": Experiment(
        "Beside and on top of DeepCache",
        "what users pick today",
        {
            **_BASE,
            "dagger": "dagger",
            "matched": "matched",
            "DeepCache 2": "deepcache[interval=2]",
            "DeepCache 3": "deepcache[interval=3]",
            "dagger + DeepCache 2": "dagger+deepcache[interval=2]",
            "matched + DeepCache 2": "matched+deepcache[interval=2]",
        },
    ),
    "questions": Experiment(
        "What the paper leaves open",
        "heads, iterations, copy rule, masks under guidance",
        {
            **_BASE,
            "heads averaged": _paper("head_fusion=mean-map"),
            **{f"{n} iterations": _paper(f"iterations={n}") for n in (1, 10, 50)},
            "copy rule transposed": _paper("similarity=attention-transposed"),
            "masks shared": _paper("guidance_masks=shared"),
            "drop after layer 2, its map": _paper("gradual=[[1,0.63]]"),
            "drop after layer 2, first map": _paper("gradual=[[1,0.63]],copy_map=first"),
        },
    ),
    "pareto": Experiment("Quality against cost", "our own method beside its peers", _pareto(), joins_kinds=True),
    "matched": Experiment(
        "What each part of matched pruning is worth, at equal cost", "our own method, one part changed", _matched()
    ),
    "why": Experiment(
        "Which part does the damage: one thing changed at a time, or two",
        "our own question",
        {
            **_BASE,
            "keep the least important": _paper("ranking=self-attention-reversed"),
            "keep at random": _paper("ranking=uniform-random"),
            "copy by cosine": _paper("similarity=cosine"),
            "least important, copy by cosine": _paper("ranking=self-attention-reversed,similarity=cosine"),
            "random, copy by cosine": _paper("ranking=uniform-random,similarity=cosine"),
            "direct copy": _paper("recovery=direct-copy"),
            "random, direct copy": _paper("ranking=uniform-random,recovery=direct-copy"),
            "second level only": _paper("where=only-second-level"),
            "third level only": "dagger",
            "no schedule": _paper("schedule=constant,cost=paper"),
            "rate 0.4": _paper("pruning_rate=0.4"),
            "rate 0.2": _paper("pruning_rate=0.2"),
        },
    ),
}
