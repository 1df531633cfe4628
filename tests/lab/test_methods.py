"""Candidates: read as they are written, applied without a trace, counted, and refused where they cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from atedm import METHODS, AtEdm, Early, Matched
from atedm.app.models import load_pipeline
from atedm.costs.budget import run_cost
from atedm.costs.report import cost
from atedm.costs.tome import ToMe
from atedm.lab.ablation import Variant
from atedm.lab.evaluation.experiments import EXPERIMENTS, GUIDANCE_SCALES
from atedm.lab.methods.by_name import method_by_name, parse_methods
from atedm.lab.methods.candidates import Candidate, Dense, Pruning
from atedm.lab.methods.counting import counted_run
from atedm.lab.methods.peers import Caching, Merging
from atedm.lab.methods.stacked import Stacked
from models import draw, sdxl_pipeline, snapshot

TINY = "tiny"


@pytest.mark.parametrize(
    "method",
    [
        Dense(),
        Pruning(METHODS["paper"]),
        Pruning(Variant(rank="uniform-random")),
        Merging(ToMe(0.5)),
        Merging(ToMe(0.5, early_share=0.3)),
        Caching(2),
        Stacked((Pruning(METHODS["matched"]), Caching(3))),
    ],
    ids=lambda method: method.kind,
)
def test_a_method_changes_the_image_and_leaves_no_trace(method: Candidate) -> None:
    pipe = sdxl_pipeline()
    dense, before = draw(pipe), snapshot(pipe.unet)
    with method.applied(pipe):
        changed = draw(pipe)
    assert torch.equal(changed, dense) == isinstance(method, Dense)
    assert snapshot(pipe.unet) == before
    assert torch.equal(draw(pipe), dense)
    with pytest.raises(RuntimeError, match="in the middle"), method.applied(pipe):
        raise RuntimeError("in the middle")
    assert snapshot(pipe.unet) == before


def test_a_run_counted_on_the_pipeline_costs_what_the_report_says() -> None:
    pipe = load_pipeline(TINY, device="cpu")

    def count(candidate: Candidate) -> int:
        call = {"prompt": "a duck", "guidance_scale": 3.0, "width": 64, "height": 64}
        return counted_run(pipe, candidate, call, 2)

    report = cost(pipe, "paper", size=(64, 64), steps=2, guidance=True)
    assert count(Dense()) == 2 * report.figures().dense
    assert count(Pruning(METHODS["paper"])) == 2 * report.figures().mean
    for tome in (ToMe(0.5), ToMe(0.3, "self-attention"), ToMe(0.5, early_share=0.3)):
        assert count(Merging(tome)) == 2 * report.with_tome(tome).mean
    assert count(Caching(2)) < 0.6 * count(Dense())


def test_methods_are_read_as_they_are_written() -> None:
    specs = "dense, paper[rate=0.5,iterations=5], tome[ratio=0.4]+deepcache[interval=3]"
    assert parse_methods(specs) == ["dense", "paper[rate=0.5,iterations=5]", "tome[ratio=0.4]+deepcache[interval=3]"]
    dense, paper, both = map(method_by_name, parse_methods(specs))
    assert dense == Dense()
    assert paper == Pruning(AtEdm(rate=0.5, iterations=5))
    assert both == Stacked((Merging(ToMe(0.4)), Caching(3)))
    assert method_by_name("paper[spare=null]") == Pruning(AtEdm(spare=None))
    assert method_by_name("paper[where=not-second-level]") == Pruning(METHODS["dagger"])
    assert method_by_name("matched[level_factors=[]]") == Pruning(Matched(level_factors=()))


def test_a_field_that_a_method_has_not_makes_a_variant() -> None:
    assert method_by_name("paper[refill=direct-copy,rate=0.5]") == Pruning(Variant(rate=0.5, refill="direct-copy"))
    assert method_by_name("dagger[early_share=0.5]").as_dict()["where"] == "not-second-level"
    merged = method_by_name("matched[merge=false]")
    assert isinstance(merged, Pruning)
    assert isinstance(merged.method, Variant)
    assert (merged.method.merge, merged.method.rank) == (False, "representative")


def test_what_is_ones_own_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_ranking.py").write_text(
        "from atedm import Early\nSPARE = Early(0.1)\ndef first(view):\n    return -view.tokens.mean(-1).float()\n"
    )
    own = method_by_name("paper[rank=own_ranking:first,spare=own_ranking:SPARE]")
    assert isinstance(own, Pruning)
    assert isinstance(own.method, AtEdm)
    assert own.method.rank is not None
    assert own.method.spare == Early(0.1)
    with pytest.raises(ValueError, match="cannot import 'own_ranking:last'"):
        method_by_name("paper[rank=own_ranking:last]")
    with pytest.raises(ValueError, match="unknown rank"):
        method_by_name("paper[rank=own_ranking:first,refill=direct-copy]")


@pytest.mark.parametrize("name", ["tome", "paper", "matched"])
def test_a_cost_is_solved_for(name: str) -> None:
    method: Any = method_by_name(f"{name}[cost=0.85]", TINY, steps=20)
    assert run_cost(TINY, method.tome if name == "tome" else method.method, steps=20) == pytest.approx(0.85, abs=0.01)


def test_equal_cost_is_that_of_another_method_over_the_steps_that_are_left() -> None:
    paper = run_cost(TINY, METHODS["paper"], steps=20)
    spread: Any = method_by_name("tome[early_share=0.3,cost=paper]", TINY, steps=20)
    assert run_cost(TINY, spread.tome, steps=20) == pytest.approx(paper, rel=0.01)
    constant: Any = method_by_name("paper[schedule=constant,cost=paper[rate=0.5]]", TINY, steps=20)
    assert constant.method.rate < 0.5
    assert method_by_name("dense[cost=0.7]") == Dense(0.7)
    assert Dense(0.7).steps_of(20) == 14
    assert method_by_name("dense[cost=paper]", TINY, steps=20) == Dense(paper)
    both = method_by_name("dense[cost=0.3]+paper[cost=0.85]", TINY, steps=4)
    assert isinstance(both, Stacked)
    assert both.parts[1] == method_by_name("paper[cost=0.85]", TINY, steps=1)
    assert both.parts[1] != method_by_name("paper[cost=0.85]", TINY, steps=4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("papre", "did you mean 'paper'"),
        ("paper[rankin=x]", "did you mean 'rank'"),
        ("paper[rank=x]", "unknown rank"),
        ("paper[where=x]", "unknown where"),
        ("tome[ratio=0.9]", "ratio must be"),
        ("tome[rate=0.5]", "did you mean 'ratio'"),
        ("dense[steps=1]", "did you mean 'steps_share'"),
        ("dense[steps_share=1.5]", "steps_share must be"),
        ("deepcache[cost=0.5]", "a cost is solved for"),
        ("paper[cost=0.2]", "cannot cost"),
        ("paper[rank]", "write field=value"),
        ("paper[", "brackets do not match"),
        ("paper[rate=0.5,rate=0.2]", "rate is given twice"),
        ("paper[rate=0.3,cost=0.8]", "give rate or cost in"),
        ("tome[ratio=0.2,cost=paper]", "give ratio or cost in"),
        ("deepcache[interval=0]", "interval must be"),
        ("tome[cost=deepcache]", "cost must be a share of dense"),
        ("matched+tome", "ToMe and pruning do not go together"),
        ("dagger+deepcache+tome", "ToMe and pruning do not go together"),
        ("deepcache+dagger", "deepcache comes last in a stack"),
        ("paper+matched", "two methods of one kind do not stack"),
    ],
)
def test_a_method_that_cannot_be_is_told_so(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_by_name(spec)


def test_a_method_is_named_once() -> None:
    with pytest.raises(ValueError, match="'paper' is named twice"):
        parse_methods("paper,dense,paper")
    with pytest.raises(ValueError, match="at least one method"):
        parse_methods(" , ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_method_of_every_experiment_can_be_read(name: str) -> None:
    known: dict[str, str] = {}
    for spec in EXPERIMENTS[name].methods.values():
        if "cost=" not in spec:  # solving takes a while, and is tested above
            method = str(method_by_name(spec, TINY, steps=20).as_dict())
            assert known.setdefault(method, spec) == spec  # one method is written one way, so its images are shared
    assert known


def test_what_an_experiment_varies_can_be_one_setting_that_was_asked_for() -> None:
    assert EXPERIMENTS["curve"].under(7.0).guidance == (7.0,)
    assert EXPERIMENTS["curve"].under(None).guidance == GUIDANCE_SCALES
    assert EXPERIMENTS["place"].under(2.0) == EXPERIMENTS["place"]


def test_methods_that_differ_in_cost_alone_are_of_one_kind() -> None:
    kinds = {
        "paper": "AT-EDM",
        "paper[rate=0.5]": "AT-EDM",
        "dagger": "AT-EDM†",
        "matched": "Matched pruning",
        "tome": "ToMe",
        "tome[early_share=0.3]": "ToMe, DSAP",
        "matched+deepcache": "Matched pruning + DeepCache",
        "dense": "dense",
        "dense[cost=0.5]": "dense, fewer steps",
    }
    assert {spec: method_by_name(spec).kind for spec in kinds} == kinds
