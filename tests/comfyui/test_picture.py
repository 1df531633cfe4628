# ruff: noqa: I001
"""The model that ships draws the same picture in ComfyUI as in diffusers, dense and pruned."""

import engine  # first: it skips these where there is no application, and brings it up where there is

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shipped
import torch

import atedm
from atedm.method.early_strength import EarlyStrength
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Cache, Plan, save_plan
from small import draw

CASES = {
    "dense": (None, None),
    "matched": ({"method": "matched", "rate": 0.6}, atedm.Matched(0.6)),
    "AT-EDM": ({"method": "AT-EDM", "rate": 0.63}, atedm.AtEdm()),
    "AT-EDM†": (
        {"method": "AT-EDM† (spares the second level)", "rate": 0.5},
        replace(atedm.METHODS["dagger"], rate=0.5),
    ),
    "gentle": (
        {"method": "matched", "rate": 0.6, "early_strength": 0.5},
        EarlyStrength(atedm.Matched(0.6), 0.5),
    ),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.set_num_threads(1)
    return shipped.bring()


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers(pipe: Any, case: str) -> None:
    node, method = CASES[case]
    found = shipped.picture(pipe, engine.Engine(), shipped.workflow(node))
    if method is None:
        expected = shipped.in_diffusers(pipe)
    else:
        with atedm.pruned(pipe, method):
            expected = shipped.in_diffusers(pipe)
    # This image by AT-EDM hangs on rounding: noise changed by a millionth gives one 23 dB away in diffusers, too.
    assert distance(case, found, expected) > (20 if case == "AT-EDM" else 40)


def distance(case: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB, which is printed."""
    decibels = float(10 * torch.log10(1 / (found - expected).square().mean()))
    print(f"{case}: {decibels:.1f} dB")
    return decibels


PLANS = {
    "forecast": {"cache": Cache(12, branch=None)},
    "forecast and matched": {"cache": Cache(15, bend=1.5, branch=None), "method": atedm.Matched(0.4)},
}


def planned(prompt: dict[str, Any], file: Path) -> dict[str, Any]:
    """Put the node of a plan between the model and the sampler."""
    prompt["plan"] = {"class_type": "AtedmTokenPruningPlan", "inputs": {"model": ["model", 0], "plan": str(file)}}
    prompt["sampler"]["inputs"]["model"] = ["plan", 0]
    return prompt


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_draws_what_it_draws_in_diffusers(pipe: Any, case: str, tmp_path: Path) -> None:
    plan = Plan(fingerprint(pipe), shipped.STEPS, guidance=shipped.GUIDANCE, **PLANS[case])  # type: ignore[arg-type]
    save_plan(plan, tmp_path / "plan.json")
    prompt = planned(shipped.workflow(), tmp_path / "plan.json")
    prompt["sampler"]["inputs"]["cfg"] = ["plan", 2]
    running = engine.Engine()
    found = shipped.picture(pipe, running, prompt)
    with atedm.pruned(pipe, tmp_path / "plan.json"):
        expected = shipped.in_diffusers(pipe)
    assert distance(case, found, expected) > 40
    assert not torch.equal(found, shipped.picture(pipe, running, shipped.workflow()))


def test_a_plan_is_read_again_when_it_changes_and_its_steps_can_be_connected(pipe: Any, tmp_path: Path) -> None:
    file, images, running = tmp_path / "plan.json", [], engine.Engine()
    for steps in (3, 5):
        save_plan(Plan(fingerprint(pipe), steps), file)
        prompt = planned(shipped.small.workflow("shipped"), file)
        prompt["empty"] = {"class_type": "TestLATENT", "inputs": {"name": "empty"}}
        prompt["sampler"]["inputs"]["steps"] = ["plan", 1]
        images.append(draw(running, prompt))
        prompt["sampler"]["inputs"] |= {"steps": steps, "model": ["model", 0]}
        assert torch.equal(images[-1], draw(running, prompt))
    assert not torch.equal(*images)


def test_a_plan_for_another_model_says_what_differs(pipe: Any, tmp_path: Path) -> None:
    save_plan(Plan(fingerprint(pipe) | {"in_channels": 9}, 3), tmp_path / "plan.json")
    event, what = engine.Engine().run(planned(shipped.workflow(), tmp_path / "plan.json"))[-1]
    assert event == "execution_error"
    assert "its in_channels is 9, here it is 4" in what["exception_message"]
