"""The paper's tables and ablations as lists of methods, one experiment a name. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

PAIRINGS = ("F-L", "F-F", "F-M", "L-F", "L-M", "L-L")
"""Those of `atedm.method.schedule`, which imports torch."""

#: Guidance scales of the paper's FID-CLIP curves (supplement Fig. 5).
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0, 12.0, 15.0)

#: Methods at whose pruning rates a normal step of SDXL at 1024 px costs the paper's 2.9, 3.6, 4.1 and 4.52 T MACs, in
#: its own convention. The paper states the third, which is written as elsewhere, so that experiments share its images.
BUDGETS = {"a": "paper[rate=0.934]", "b": "paper[rate=0.746]", "c": "paper", "d": "paper[rate=0.513]"}


@dataclass(frozen=True)
class Experiment:
    """Methods to compare, under one or several settings."""

    title: str
    source: str  #: What it reproduces; empty for a list of one's own, of which each method must run.
    methods: dict[str, str]  #: Methods by label, as `atedm.lab.methods.by_name` reads them.
    guidance: tuple[float, ...] = ()  #: Guidance scales; empty for the one asked for.
    #: Whether its chart shows quality against cost, and joins methods that differ in their cost alone.
    against_cost: bool = False

    def under(self, guidance: float | None) -> Experiment:
        """Return the experiment under the one guidance scale that was asked for, where it would vary it."""
        return replace(self, guidance=(guidance,)) if guidance is not None and self.guidance else self


def _each(method: str, values: Iterable[object], label: str = "{}") -> dict[str, str]:
    """One method a value, which is written into the method and its label."""
    return {label.format(value): method.format(value) for value in values}


def _budgets() -> dict[str, str]:
    methods = {"dense": "dense"}
    for name, ours in BUDGETS.items():
        methods[f"AT-EDM-{name}"] = ours
        methods[f"ToMe-{name}"] = f"tome[cost={ours}]"
        methods[f"ToMe-{name}, DSAP"] = f"tome[early_share=0.3,cost={ours}]"
        methods[f"matched-{name}"] = f"matched[cost={ours}]"
    return methods | {"AT-EDM†": "dagger", "ToMe at †": "tome[cost=dagger]", "matched at †": "matched[cost=dagger]"}


def _pareto() -> dict[str, str]:
    """Every method at every cost; what is out of reach is left out when it is run."""
    methods = {"dense": "dense"}
    for cost in (0.85, 0.75, 0.65, 0.55, 0.45, 0.35):
        for label, name in (("fewer steps", "dense"), ("AT-EDM", "paper"), ("ToMe", "tome"), ("matched", "matched")):
            methods[f"{label} {cost}"] = f"{name}[cost={cost}]"
    methods["matched 0.5"] = "matched[cost=0.5]"
    stacked = _each("matched[rate=0.4]+deepcache[interval={}]", (2, 3), "matched + DeepCache {}")
    return methods | _each("deepcache[interval={}]", (2, 3, 5), "DeepCache {}") | stacked


def _few_steps() -> dict[str, str]:
    """Four steps leave two costs to fewer steps; the others are solved for four. "turbo" reaches no such cost.

    One cache is for U-Nets, two for transformers; the other kind is left out.
    """
    methods = {"dense": "dense", "turbo": "turbo"} | _each("dense[cost={}]", (0.75, 0.5), "fewer steps {}")
    for cost in (0.85, 0.75, 0.6, 0.5):
        methods[f"AT-EDM {cost}"] = f"paper[schedule=constant,cost={cost}]"
        methods[f"ToMe {cost}"] = f"tome[cost={cost}]"
        methods[f"matched {cost}"] = f"matched[cost={cost}]"
    return methods | {
        "DeepCache 2": "deepcache[interval=2]",
        "TaylorSeer 2": "taylorseer[interval=2,warmup=1]",
        "pyramid 2": "pyramid[interval=2]",
    }


_BASE = {"dense": "dense", "paper": "paper"}
_PLACES = _each("paper[place={}]", ("before-feed-forward", "after-self-attention"))
_MAPPINGS = ("entropy", "power", "soft-clip", "hard-clip")
_RANKS = {
    **_each("paper[rank={}]", [f"cross-attention-{mapping}" for mapping in _MAPPINGS]),
    **_each("paper[rank={}]", ("attention-received", "uniform-random")),
}
_COPY_BY_COSINE = {"copy by cosine": "paper[match=cosine]"}
_REFILLS = {**_each("paper[refill={}]", ("zero-padding", "bicubic", "direct-copy")), **_COPY_BY_COSINE}
_SCHEDULES = _each("paper[schedule={},cost=paper]", ("prune-more-early", "constant"))
_HEADS = {"heads averaged": "paper[head_fusion=mean-map]"}
_RANDOM_COPIES = {"random, copy by cosine": "paper[rank=uniform-random,match=cosine]"}
_MATCHED = {
    "kept by G-WPR": "rank=self-attention",
    "kept at random": "rank=uniform-random",
    "kept by cells": "rank=cells",
    "kept by importance in cells": "rank=important-of-cells",
    "kept by lattice": "rank=lattice",
    "kept by facility location": "rank=facility-location",
    "copied": "refill=similarity-copy,merge=false,own_update_share=0",
    "no own update": "own_update_share=0",
    **_each("match={}", ("cosine", "attention"), "match by {}"),
    "not merged": "merge=false",
    "attention does not count": "counts=false",
    "neither": "merge=false,counts=false",
    "after the first layer": "place=after-feed-forward",
    "after self-attention": "place=after-self-attention",
    "one rate for all levels": "level_factors=[]",
    **_each("schedule=prune-{}-early", ("less", "more"), "{} early"),
    **_each("refresh_every={}", (2, 5), "a choice for {} steps"),
    "not the second level": "where=not-second-level",
}
"""Matched pruning with one part changed."""

EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment("AT-EDM and ToMe at equal cost", "Table 1, Fig. 7", _budgets(), against_cost=True),
    "curve": Experiment(
        "FID against CLIP score over guidance scales",
        "supplement Fig. 5",
        {**_BASE, "dagger": "dagger", "ToMe": "tome[cost=paper]", "matched": "matched[cost=paper]"},
        guidance=GUIDANCE_SCALES,
    ),
    "place": Experiment("Where in the layer tokens are dropped", "supplement C.1, Fig. 8", {**_BASE, **_PLACES}),
    "rankings": Experiment(
        "What tokens are ranked by, mappings of cross-attention among them",
        "supplement C.2, Fig. 9",
        {**_BASE, **_RANKS},
    ),
    "blocks": Experiment(
        "Which blocks early steps spare",
        "supplement C.3, Fig. 10",
        {"dense": "dense", PAIRINGS[0]: "paper", **_each("paper[pairing={}]", PAIRINGS[1:])},
    ),
    "early": Experiment(
        "Prune less early, more early, or always alike, at equal cost",
        "supplement C.5, Fig. 11",
        {**_BASE, **_SCHEDULES},
    ),
    "recovery": Experiment("How dropped tokens are refilled", "supplement A.6", {**_BASE, **_REFILLS}),
    "prune-less-steps": Experiment(
        "How many steps prune less, at equal cost",
        "supplement C.4",
        {**_BASE, **{f"{share:.0%}": f"paper[early_share={share},cost=paper]" for share in (0.0, 0.1, 0.2, 0.5)}},
    ),
    "gradual": Experiment(
        "Later and gradual pruning inside a block",
        "supplement A.2",
        {**_BASE, "after layer 2": "paper[gradual=[[1,0.63]]]", "in two layers": "paper[gradual=[[0,0.4],[1,0.4]]]"},
    ),
    "reuse": Experiment(
        "A choice of tokens kept for several steps, at equal cost",
        "supplement F(2)",
        {
            "dense": "dense",
            "AT-EDM†": "dagger",
            **_each("dagger[refresh_every={},cost=dagger]", (2, 5), "kept for {} steps"),
        },
    ),
    "few-steps": Experiment(
        "On a model for few steps, such as tiny-turbo, at equal cost",
        "supplement E",
        _few_steps(),
        against_cost=True,
    ),
    "ablation": Experiment(
        "Every choice of the paper, one changed at a time",
        "main paper and supplement",
        {**_BASE, "dagger": "dagger", **_HEADS, **_RANKS, **_REFILLS, **_RANDOM_COPIES, **_PLACES, **_SCHEDULES},
    ),
    "stacking": Experiment(
        "Beside and on top of DeepCache",
        "what users pick today",
        {
            **_each("{}", ("dense", "paper", "dagger", "matched")),
            **_each("deepcache[interval={}]", (2, 3), "DeepCache {}"),
            **_each("{}+deepcache[interval=2]", ("dagger", "matched"), "{} + DeepCache 2"),
        },
    ),
    "questions": Experiment(
        "What the paper leaves open",
        "heads, iterations",
        {**_BASE, **_HEADS, **_each("paper[iterations={}]", (1, 10, 50), "{} iterations")},
    ),
    "pareto": Experiment("Quality against cost", "our own method beside its peers", _pareto(), against_cost=True),
    "matched": Experiment(
        "What each part of matched pruning is worth, at equal cost",
        "our own method, one part changed",
        {
            **_each("{}", ("dense", "matched")),
            **{label: f"matched[{change},cost=matched]" for label, change in _MATCHED.items()},
        },
    ),
    "why": Experiment(
        "Which part does the damage: one thing changed at a time, or two",
        "our own question",
        {
            **_BASE,
            "keep the least important": "paper[rank=self-attention-reversed]",
            "keep at random": "paper[rank=uniform-random]",
            **_COPY_BY_COSINE,
            "least important, copy by cosine": "paper[rank=self-attention-reversed,match=cosine]",
            **_RANDOM_COPIES,
            "direct copy": "paper[refill=direct-copy]",
            "random, direct copy": "paper[rank=uniform-random,refill=direct-copy]",
            "update by attention": "paper[refill=matched-update]",
            "update by cosine": "paper[refill=matched-update,match=cosine]",
            "random, update by cosine": "paper[rank=uniform-random,refill=matched-update,match=cosine]",
            "representative, copy by cosine": "paper[rank=representative,match=cosine]",
            "representative, update by cosine": "paper[rank=representative,refill=matched-update,match=cosine]",
            "second level only": "paper[where=only-second-level]",
            "third level only": "dagger",
            "no schedule": "paper[schedule=constant,cost=paper]",
            **_each("paper[rate={}]", (0.4, 0.2), "rate {}"),
        },
    ),
}
