"""A plan is a file that says everything, is read strictly, and leaves a pipeline as it was."""

import copy
import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atedm
from atedm.app.models import load_pipeline
from atedm.lab.methods.by_name import method_by_name
from atedm.lab.methods.candidates import Dense, Planned
from atedm.lab.methods.counting import counted_run
from atedm.lab.methods.peers import Caching
from atedm.lab.methods.stacked import Stacked
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Cache, Plan, full_steps, read_plan, save_plan
from models import sdxl_pipeline, snapshot

CALL: dict[str, Any] = {"prompt": "a duck", "guidance_scale": 3.0, "width": 128, "height": 128}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


@pytest.fixture(scope="module")
def plan(pipe: Any) -> Plan:
    return Plan(
        fingerprint(pipe), 6, "dpm++", atedm.Matched(rate=0.5), Cache(4, 1.4, 1), 3.0, (128, 128), found={"cost": 0.4}
    )


def latents(pipe: Any, steps: int) -> torch.Tensor:
    noise = torch.Generator("cpu").manual_seed(1)
    found: torch.Tensor = pipe(**CALL, num_inference_steps=steps, generator=noise, output_type="latent").images
    return found


def test_what_is_written_is_read_back(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert read == plan
    assert read.folder == tmp_path
    assert read.settings() == plan.settings()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stpes": 4}, "unknown field 'stpes'; did you mean 'steps'"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": None}, "steps must be a whole number"),
        ({"plan": 2}, '"plan" must be 1'),
        ({"scheduler": "eulr"}, "unknown scheduler"),
        ({"method": {"method": "matched", "rat": 0.5}}, "Matched has no field 'rat'"),
        ({"method": "matched"}, "method must be fields by name"),
        ({"cache": {"full": 9}}, "full must be at most the 6 steps"),
        ({"cache": {"full": 2, "interval": 2}}, "unknown field of cache 'interval'"),
        ({"cache": {"full": 2, "bend": 100}}, "bend must be from 0.25 to 4"),
        ({"guidance": -1}, "guidance must be"),
        ({"size": [128]}, "size must be"),
        ({"size": 128}, "size must be"),
        ({"lora": 3}, "lora must be"),
        ({"found": {"dense_steps": "20"}}, "dense_steps of found must be a whole number"),
        ({"found": {"cost": "half"}}, "cost of found must be a number"),
        ({"model": "tiny"}, "model must be fields by name"),
    ],
)
def test_a_wrong_field_ends_in_one_clear_line(plan: Plan, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.as_dict() | change))
    with pytest.raises(ValueError, match=r"plan\.json is no plan that can be used: ") as caught:
        read_plan(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no plan at"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is no JSON"):
        read_plan(tmp_path / "plan.json")


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.25, 4))
def test_whole_steps_ascend_from_the_first_and_are_as_many_as_asked_for(steps: int, full: int, bend: float) -> None:
    found = full_steps(steps, full, bend)
    assert len(found) == min(full, steps)
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    assert found[-1] < steps


def test_a_plan_does_what_its_parts_do_one_by_one(pipe: Any, plan: Plan) -> None:
    even = dataclasses.replace(plan, scheduler=None, cache=Cache(3))
    with atedm.pruned(pipe, even):
        ours = latents(pipe, 6)
    with Stacked((method_by_name("matched[rate=0.5]"), Caching(2))).applied(pipe):
        theirs = latents(pipe, 6)
    assert torch.equal(ours, theirs)


def test_a_forecast_lies_on_the_line_through_the_last_two_outputs(pipe: Any, plan: Plan) -> None:
    calls: list[torch.Tensor] = []
    hook = pipe.unet.register_forward_hook(lambda _, __, output: calls.append(output[0].clone()))
    inner: list[int] = []
    middle = pipe.unet.mid_block.register_forward_hook(lambda *_: inner.append(len(calls)))
    only = dataclasses.replace(plan, scheduler=None, method=None, cache=Cache(3, 1.0, None))
    with atedm.pruned(pipe, only):
        latents(pipe, 6)
    hook.remove()
    middle.remove()
    assert inner == [0, 2, 4]
    assert torch.equal(calls[1], calls[0])
    assert torch.allclose(calls[3], calls[2] + (calls[2] - calls[0]) / 2, atol=1e-6)
    assert torch.allclose(calls[5], calls[4] + (calls[4] - calls[2]) / 2, atol=1e-6)


@pytest.mark.parametrize("branch", [0, 1, None])
def test_the_cache_is_new_in_every_run(pipe: Any, plan: Plan, branch: int | None) -> None:
    plan = dataclasses.replace(plan, cache=Cache(4, 1.4, branch))
    with atedm.pruned(pipe, plan):
        first, other, again = latents(pipe, 6), latents(pipe, 9), latents(pipe, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_everything_is_as_before_when_a_plan_is_removed(pipe: Any, plan: Plan) -> None:
    before, dense, scheduler = snapshot(pipe.unet), latents(pipe, 3), pipe.scheduler
    summary = str(atedm.apply(pipe, plan))
    assert atedm.is_applied(pipe)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert "11 of 11 blocks are pruned.\n" in summary
    assert "num_inference_steps=6, guidance_scale=3" in summary
    assert not torch.equal(latents(pipe, 3), dense)
    with pytest.raises(ValueError, match="patched already"):
        atedm.apply(pipe, plan)
    atedm.remove(pipe)
    assert pipe.scheduler is scheduler
    assert not atedm.is_applied(pipe)
    assert snapshot(pipe.unet) == before
    assert torch.equal(latents(pipe, 3), dense)


def test_a_plan_without_pruning_counts_as_applied(pipe: Any, plan: Plan) -> None:
    summary = atedm.apply(pipe, dataclasses.replace(plan, method=None))
    assert atedm.is_applied(pipe)
    assert "blocks are pruned" not in str(summary)
    assert "4 of them whole" in str(summary)
    assert summary.kept_share() == 1.0
    with pytest.raises(ValueError, match="has a plan already"):
        atedm.apply(pipe, plan)
    atedm.remove(pipe)
    assert not atedm.is_applied(pipe)


def test_a_run_that_raised_leaves_a_plan_that_can_be_removed(pipe: Any, plan: Plan) -> None:
    before, dense = snapshot(pipe.unet), latents(pipe, 3)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), atedm.pruned(pipe, plan):
        pipe(**CALL, num_inference_steps=6, callback_on_step_end=stop)
    assert snapshot(pipe.unet) == before
    assert torch.equal(latents(pipe, 3), dense)


def test_a_plan_for_another_model_is_refused_by_what_differs(plan: Plan) -> None:
    other = sdxl_pipeline()
    before = snapshot(other.unet)
    with pytest.raises(ValueError, match=r"this plan is for another model: its .* is .*, here it is"):
        atedm.apply(other, plan)
    assert snapshot(other.unet) == before


def test_a_pipeline_with_a_plan_is_freed_and_its_copies_are_their_own(plan: Plan) -> None:
    other = load_pipeline("tiny", device="cpu")
    atedm.apply(other, dataclasses.replace(plan, cache=None))
    again = copy.deepcopy(other.unet)
    assert atedm.is_applied(again)
    atedm.remove(again)
    assert not atedm.is_applied(again)
    assert atedm.is_applied(other)
    freed = weakref.ref(other.unet)
    del other
    gc.collect()
    assert freed() is None


def test_a_unet_alone_takes_a_plan_that_only_prunes(pipe: Any, plan: Plan) -> None:
    unet = copy.deepcopy(pipe.unet)
    with pytest.raises(TypeError, match="has a scheduler, which is set on a whole pipeline"):
        atedm.apply(unet, plan)
    atedm.apply(unet, dataclasses.replace(plan, scheduler=None, cache=None))
    assert atedm.is_applied(unet)
    atedm.remove(unet)


def test_a_missing_lora_is_named_before_anything_is_changed(pipe: Any, plan: Plan, tmp_path: Path) -> None:
    before, scheduler = snapshot(pipe.unet), pipe.scheduler
    with pytest.raises(FileNotFoundError, match=r"the LoRA of this plan is not at .*lora"):
        atedm.apply(pipe, dataclasses.replace(plan, lora="lora", folder=tmp_path))
    assert snapshot(pipe.unet) == before
    assert pipe.scheduler is scheduler


def test_a_budget_beside_a_plan_is_refused(pipe: Any, plan: Plan) -> None:
    with pytest.raises(ValueError, match="leave budget out"):
        atedm.apply(pipe, plan, budget=0.5)  # type: ignore[call-overload]


def test_a_plan_is_compared_as_a_method(pipe: Any, plan: Plan, tmp_path: Path) -> None:
    save_plan(dataclasses.replace(plan, found={"dense_steps": 12}), tmp_path / "plan.json")
    candidate = method_by_name(str(tmp_path / "plan.json"))
    assert isinstance(candidate, Planned)
    assert (candidate.steps_of(12), candidate.steps_of(6), candidate.steps_of(24)) == (6, 3, 12)
    assert counted_run(pipe, candidate, CALL, 12) < 0.5 * counted_run(pipe, Dense(), CALL, 12)
