"""The paper's tables and ablations as lists of methods, one experiment a name. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, replace

PAIRINGS = ("F-L", "F-F", "F-M", "L-F", "L-M", "L-L")
"""Those of `atedm.method.schedule`, which imports torch."""

#: Guidance scales of the paper's FID-CLIP curves (supplement Fig. 5).
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0, 12.0, 15.0)

#: Pruning rates at which a normal step of SDXL at 1024 px costs the paper's 2.9, 3.6, 4.1 and 4.52 T MACs, in its own
#: convention. The paper states the third.
BUDGETS = {"a": 0.934, "b": 0.746, "c": 0.63, "d": 0.513}


@dataclass(frozen=True)
class Experiment:
    """Methods to compare, under one or several settings."""

    title: str
    #: What it reproduces.
    source: str
    #: Methods by label, as `atedm.lab.methods.by_name` reads them.
    methods: dict[str, str]
    #: Guidance scales; empty for the one asked for.
    guidance: tuple[float, ...] = ()
    #: Numbers of steps; empty for the one asked for.
    steps: tuple[int, ...] = ()
    #: Whether its chart shows quality against cost, and joins methods that differ in their cost alone.
    against_cost: bool = False

    def under(self, steps: int | None = None, guidance: float | None = None) -> Experiment:
        """Return the experiment under the one setting that was asked for, where it would vary it."""
        return replace(
            self,
            steps=(steps,) if steps is not None and self.steps else self.steps,
            guidance=(guidance,) if guidance is not None and self.guidance else self.guidance,
        )


def _paper(changes: str) -> str:
    return f"paper[{changes}]"


def _budgets() -> dict[str, str]:
    methods = {"dense": "dense"}
    for name, rate in BUDGETS.items():
        # Written alike wherever it comes, so that experiments share its images.
        ours = "paper" if name == "c" else _paper(f"rate={rate}")
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
    caching = {f"DeepCache {n}": f"deepcache[interval={n}]" for n in (2, 3, 5)}
    stacked = {f"matched + DeepCache {n}": f"matched[rate=0.4]+deepcache[interval={n}]" for n in (2, 3)}
    return methods | caching | stacked


def _matched(changes: str) -> str:
    """Matched pruning with one part changed, at the cost of the whole."""
    return f"matched[{changes},cost=matched]"


_BASE = {"dense": "dense", "paper": "paper"}
_PLACES = {name: _paper(f"place={name}") for name in ("before-feed-forward", "after-self-attention")}
_RANKS = {
    name: _paper(f"rank={name}")
    for name in (
        "cross-attention-entropy",
        "cross-attention-power",
        "cross-attention-soft-clip",
        "cross-attention-hard-clip",
        "attention-received",
        "uniform-random",
    )
}
_REFILLS = {
    **{name: _paper(f"refill={name}") for name in ("zero-padding", "bicubic", "direct-copy")},
    "copy by cosine": _paper("match=cosine"),
}
_SCHEDULES = {name: _paper(f"schedule={name},cost=paper") for name in ("prune-more-early", "constant")}
_HEADS = {"heads averaged": _paper("head_fusion=mean-map")}
_RANDOM_COPIES = {"random, copy by cosine": _paper("rank=uniform-random,match=cosine")}

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
        {"dense": "dense", "F-L": "paper", **{name: _paper(f"pairing={name}") for name in PAIRINGS if name != "F-L"}},
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
        {**_BASE, **{f"{share:.0%}": _paper(f"early_share={share},cost=paper") for share in (0.0, 0.1, 0.2, 0.5)}},
    ),
    "gradual": Experiment(
        "Later and gradual pruning inside a block",
        "supplement A.2",
        {**_BASE, "after layer 2": _paper("gradual=[[1,0.63]]"), "in two layers": _paper("gradual=[[0,0.4],[1,0.4]]")},
    ),
    "reuse": Experiment(
        "A choice of tokens kept for several steps, at equal cost",
        "supplement F(2)",
        {
            "dense": "dense",
            "AT-EDM†": "dagger",
            **{f"kept for {n} steps": f"dagger[refresh_every={n},cost=dagger]" for n in (2, 5)},
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
    "ablation": Experiment(
        "Every choice of the paper, one changed at a time",
        "main paper and supplement",
        {**_BASE, "dagger": "dagger", **_HEADS, **_RANKS, **_REFILLS, **_RANDOM_COPIES, **_PLACES, **_SCHEDULES},
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
        "heads, iterations",
        {**_BASE, **_HEADS, **{f"{n} iterations": _paper(f"iterations={n}") for n in (1, 10, 50)}},
    ),
    "pareto": Experiment("Quality against cost", "our own method beside its peers", _pareto(), against_cost=True),
    "matched": Experiment(
        "What each part of matched pruning is worth, at equal cost",
        "our own method, one part changed",
        {
            "dense": "dense",
            "matched": "matched",
            "kept by G-WPR": _matched("rank=self-attention"),
            "kept at random": _matched("rank=uniform-random"),
            "kept by cells": _matched("rank=cells"),
            "kept by importance in cells": _matched("rank=important-of-cells"),
            "kept by lattice": _matched("rank=lattice"),
            "kept by facility location": _matched("rank=facility-location"),
            "copied": _matched("refill=similarity-copy,merge=false,own_update_share=0"),
            "no own update": _matched("own_update_share=0"),
            "match by cosine": _matched("match=cosine"),
            "match by attention": _matched("match=attention"),
            "not merged": _matched("merge=false"),
            "attention does not count": _matched("counts=false"),
            "neither": _matched("merge=false,counts=false"),
            "after the first layer": _matched("place=after-feed-forward"),
            "after self-attention": _matched("place=after-self-attention"),
            "one rate for all levels": _matched("level_factors=[]"),
            "less early": _matched("schedule=prune-less-early"),
            "more early": _matched("schedule=prune-more-early"),
            "a choice for 2 steps": _matched("refresh_every=2"),
            "a choice for 5 steps": _matched("refresh_every=5"),
            "not the second level": _matched("where=not-second-level"),
        },
    ),
    "why": Experiment(
        "Which part does the damage: one thing changed at a time, or two",
        "our own question",
        {
            **_BASE,
            "keep the least important": _paper("rank=self-attention-reversed"),
            "keep at random": _paper("rank=uniform-random"),
            "copy by cosine": _paper("match=cosine"),
            "least important, copy by cosine": _paper("rank=self-attention-reversed,match=cosine"),
            **_RANDOM_COPIES,
            "direct copy": _paper("refill=direct-copy"),
            "random, direct copy": _paper("rank=uniform-random,refill=direct-copy"),
            "second level only": _paper("where=only-second-level"),
            "third level only": "dagger",
            "no schedule": _paper("schedule=constant,cost=paper"),
            "rate 0.4": _paper("rate=0.4"),
            "rate 0.2": _paper("rate=0.2"),
        },
    ),
}
