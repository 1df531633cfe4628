"""The search: its costs are torch's count, its plans keep to the budget, and a killed search ends as it would have."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

import atedm
from atedm.costs.architectures import architecture
from atedm.lab.methods.candidates import Dense, Planned
from atedm.lab.methods.counting import counted_run
from atedm.method.presets import METHODS
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Cache, Plan, read_plan
from atedm.tiny.scenes import held_out_scenes
from atedm.tuning.costs import Arithmetic
from atedm.tuning.page import pareto
from atedm.tuning.prompts import tuning_prompts
from atedm.tuning.search import Tried
from atedm.tuning.space import OWN, OutOfSpace, Space
from atedm.tuning.timing import Times
from models import sdxl_pipeline, sdxl_unet

SMALL: dict[str, Any] = {"of": "arithmetic", "steps": 5, "prompts": ["a duck", "a castle"], "model": "tiny"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """As small as can be: weights do not matter to a search."""
    return sdxl_pipeline(unet=sdxl_unet(layers_per_block=2))


@pytest.fixture(scope="module")
def arithmetic(pipe: Any) -> Arithmetic:
    return Arithmetic.counted(architecture(pipe), None, (0, 1))


@pytest.fixture(scope="module")
def dense(pipe: Any) -> Plan:
    return Plan(fingerprint(pipe), 8, guidance=3.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 5},
        {"cache": Cache(3)},
        {"cache": Cache(4, 1.2, None), "method": METHODS["matched"]},
        {"cache": Cache(3, 2.0, 1), "steps": 7},
        {"method": METHODS["matched"], "steps": 6, "cache": Cache(4, 0.7)},
        {"method": METHODS["paper"], "cache": Cache(5, 1.0, 1)},
    ],
)
def test_arithmetic_is_what_torch_counts_on_a_run(
    pipe: Any, arithmetic: Arithmetic, dense: Plan, changes: dict[str, Any]
) -> None:
    plan = dataclasses.replace(dense, **changes)
    call = {"prompt": "a duck", "guidance_scale": 3.0}
    counted = counted_run(pipe, Planned(plan), call, plan.steps) / counted_run(pipe, Dense(), call, 8)
    assert arithmetic.share(plan, 8) == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_every_point_keeps_to_the_budget_and_uses_it(arithmetic: Arithmetic, dense: Plan, budget: float) -> None:
    space = Space(dataclasses.replace(dense, steps=20), arithmetic, budget, (0, 1, None))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    pruned = 0
    for _ in range(16):
        values = space.point(study.ask())
        try:
            plan = space.plan(values)
        except OutOfSpace:
            continue
        share = arithmetic.share(plan, 20)
        assert share <= budget
        if plan.method is not None:  # else whole steps are all there is to spend it on
            pruned += 1
            assert share > budget - 0.02
    assert pruned > 1


def test_single_techniques_keep_to_the_budget_and_are_single(arithmetic: Arithmetic, dense: Plan) -> None:
    space = Space(dataclasses.replace(dense, steps=20), arithmetic, 0.7, (0, 1, None))
    singles = dict(space.singles())
    assert {
        "fewer steps",
        "fewer steps, dpm++",
        "fewer steps, unipc",
        "DeepCache",
        "forecast",
        "matched",
    } <= singles.keys()
    assert singles["fewer steps"].steps == 14
    for plan in singles.values():
        assert arithmetic.share(plan, 20) <= 0.7
        assert (plan.steps < 20) + (plan.cache is not None) + (plan.method is not None) == 1
    cache = singles["DeepCache"].cache
    assert cache is not None
    assert arithmetic.share(dataclasses.replace(space.base, cache=Cache(cache.full + 1)), 20) > 0.7


def test_a_budget_that_nothing_keeps_to_is_out_of_space(arithmetic: Arithmetic, dense: Plan) -> None:
    space = Space(dense, arithmetic, 0.05)
    with pytest.raises(OutOfSpace, match="not one step"):
        space.plan({"scheduler": OWN, "cached": 0.0, "pruned": 0.0})


def test_times_are_added_up_and_read_back(arithmetic: Arithmetic, dense: Plan) -> None:
    matched = METHODS["matched"]
    step = arithmetic.step(matched)
    times = Times(arithmetic, 1.0, 2.0, {0: 0.25}, ((step - 0.1, 1.0), (step + 0.1, 1.5)))
    assert times.share(dense, 8) == 1
    plan = dataclasses.replace(dense, steps=6, method=matched, cache=Cache(4))
    assert times.share(plan, 8) == pytest.approx((1 + 4 * 1.25 + 2 * 0.25) / (1 + 8 * 2))
    assert Times.from_dict(arithmetic, json.loads(json.dumps(times.as_dict()))) == times


def test_the_front_holds_what_nothing_is_both_cheaper_and_nearer_than(dense: Plan) -> None:
    points = [(0.5, 30.0), (0.4, 31.0), (0.3, 20.0), (0.45, 31.0), (0.6, 35.0)]
    tried = [Tried("", dense, share, (distance,), is_whole=True) for share, distance in points]
    assert [(one.share, one.distance) for one in pareto(tried)] == [(0.3, 20.0), (0.4, 31.0), (0.6, 35.0)]


def test_prompts_of_the_search_are_not_those_that_judge_it() -> None:
    judged = {scene.caption for scene in held_out_scenes(1000)}
    assert not judged & set(tuning_prompts("tiny", 64))
    assert len(set(tuning_prompts("some/model", 16))) == 16


def test_the_plan_is_the_nearest_and_never_behind_a_single_technique(pipe: Any, tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    tuned = atedm.tune(pipe, 0.6, **SMALL, images=18, out=tmp_path, progress=lambda *what: told.append(what))
    assert not tuned.was_stopped
    assert read_plan(tuned.file) == tuned.plan
    whole = [one for one in tuned.tried if one.is_whole]
    assert tuned.plan.found["distance"] == round(max(one.distance for one in whole), 3)
    assert {"fewer steps", "DeepCache"} <= {one.name for one in whole}
    assert any(one.name.startswith("trial") for one in tuned.tried)
    assert all(one.share <= 0.6 for one in tuned.tried)
    assert told[-1][1] <= told[-1][2] == 18
    found = tuned.plan.found
    assert found["cost"] <= 0.6
    assert found["seconds"] > 0
    assert found["machine"]["device"] == "cpu"
    assert {"clip_score", "dense_clip_score"} <= found.keys()
    page = tuned.page.read_text()
    assert page.count("data:image/png") == 2
    assert tuned.plan.what() in page
    assert f"CLIP score {found['clip_score']:.4f}" in page
    assert not atedm.is_applied(pipe)
    # Other settings in the same folder are refused.
    with pytest.raises(ValueError, match="holds a search with another steps"):
        atedm.tune(pipe, 0.6, **SMALL | {"steps": 6}, out=tmp_path)


def same(a: Plan, b: Plan) -> bool:
    return a.settings() == b.settings() and a.found["distances"] == b.found["distances"]


def test_a_search_that_was_stopped_gives_the_best_so_far_and_goes_on(pipe: Any, tmp_path: Path) -> None:
    whole = atedm.tune(pipe, 0.6, **SMALL, images=14, out=tmp_path / "whole")
    images = 0

    def stop(what: str, done: float, total: float) -> None:
        nonlocal images
        images += 1
        if images == 9:
            raise KeyboardInterrupt

    stopped = atedm.tune(pipe, 0.6, **SMALL, images=14, out=tmp_path / "stopped", progress=stop)
    assert stopped.was_stopped
    assert read_plan(stopped.file) == stopped.plan
    again = atedm.tune(pipe, 0.6, **SMALL, images=14, out=tmp_path / "stopped")
    assert same(again.plan, whole.plan)
    assert [(one.name, one.distances) for one in again.tried] == [(one.name, one.distances) for one in whole.tried]


def test_a_search_that_was_killed_ends_as_it_would_have(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text(SMALL["prompts"][0])
    small = SMALL | {"steps": 4, "prompts": SMALL["prompts"][:1], "model": "model"}
    command = [
        *(sys.executable, "-m", "atedm", "tune", "model", "--of", "arithmetic", "--steps", "4", "--budget", "0.6"),
        *("--images", "8", "--prompts", "prompts.txt", "--device", "cpu", "--out", "killed"),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    images = tmp_path / "killed" / "images"
    until = time.monotonic() + 120
    while len(list(images.glob("*/*.png"))) < 3 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "plan.html").exists()
    again = atedm.tune(pipe, 0.6, **small, images=8, out=tmp_path / "killed")
    whole = atedm.tune(pipe, 0.6, **small, images=8, out=tmp_path / "whole")
    assert same(again.plan, whole.plan)


def test_a_budget_of_time_measures_steps_once(pipe: Any, tmp_path: Path) -> None:
    first = atedm.tune(pipe, 0.7, **SMALL | {"of": "time"}, images=24, out=tmp_path)
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["dense"] > times["cached"]["0"] > 0
    assert len(times["pruned"]) == 4
    assert first.plan.found["of"] == "time"
    again = atedm.tune(pipe, 0.7, **SMALL | {"of": "time"}, images=24, out=tmp_path)
    assert again.plan == first.plan
    assert json.loads((tmp_path / "times.json").read_text()) == times


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 1.0}, "budget must be above 0 and below 1"),
        ({"budget": "half"}, "budget must be above 0 and below 1"),
        ({"of": "memory"}, "unknown budget of 'memory'"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"steps": 0}, "steps must be"),
        ({"images": 0}, "images must be"),
        ({"images": 3}, "not one plan at a budget of 0.5 could be drawn with 3 images"),
    ],
)
def test_bad_arguments_are_refused(pipe: Any, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        atedm.tune(pipe, **{"budget": 0.5, **SMALL, "out": tmp_path, **changes})


def test_a_patched_pipeline_is_refused(pipe: Any, tmp_path: Path) -> None:
    with atedm.pruned(pipe), pytest.raises(ValueError, match="this pipeline is patched"):
        atedm.tune(pipe, 0.5, **SMALL, out=tmp_path)
