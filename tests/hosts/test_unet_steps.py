"""Where a step stands in its run: for every way to hand over a timestep, and every scheduler."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline

import atedm
from atedm import AtEdm, Early
from atedm.costs.spans import early_steps
from atedm.hosts.runs import StepPosition, step_position
from models import draw, scheduler, sdxl_pipeline, small_unet, watched

# All that the SDXL pipelines name as compatible, and others that run in them too.
COMPATIBLE = sorted({each.__name__ for each in EulerDiscreteScheduler().compatibles})
SCHEDULERS = [*COMPATIBLE, "LCMScheduler", "TCDScheduler", "SASolverScheduler"]


def make_scheduler(name: str, **changes: Any) -> Any:
    kind = getattr(diffusers, name)
    if kind.__module__.startswith("diffusers.utils.dummy"):
        pytest.skip(f"{name} needs {kind._backends}")
    return kind.from_config(scheduler().config, **changes)


# --- the timestep alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.float16])
def test_an_element_of_a_list_stands_where_it_sits(dtype: torch.dtype, inference_mode: bool) -> None:
    with torch.inference_mode(inference_mode), torch.no_grad():
        # The values are of no account: every element is 7.
        timesteps = torch.full((8,), 7, dtype=dtype)
        for index, t in enumerate(timesteps):
            expected = StepPosition(index, index / 8)
            for same in (t, timesteps[index], t[None], t.view(1), t.expand(4), t[None].expand(4), t.expand(2, 3)):
                assert step_position(same) == expected
            assert step_position(timesteps[index : index + 1]) == expected
            assert step_position(timesteps[index : index + 1].expand(4)) == expected


def test_an_element_is_placed_without_reading_it() -> None:
    timesteps = torch.empty(8, device="meta")
    assert [step_position(t) for t in timesteps] == [StepPosition(i, i / 8) for i in range(8)]


def test_a_part_of_a_list_stands_in_the_whole() -> None:
    timesteps = torch.linspace(999, 0, 10)
    assert [step_position(t) for t in timesteps[5:]] == [StepPosition(i, i / 10) for i in range(5, 10)]
    assert [step_position(t) for t in timesteps[:4]] == [StepPosition(i, i / 10) for i in range(4)]
    assert [step_position(t) for t in timesteps[2:9][3:]] == [StepPosition(i, i / 10) for i in range(5, 9)]


@pytest.mark.parametrize(
    ("timestep", "share"),
    [
        (999, 0.0),
        (500, 0.499),
        (0, 0.999),
        (999.0, 0.0),
        (249.5, 0.7495),
        (torch.tensor(999), 0.0),
        (torch.tensor(0.0), 0.999),
        (torch.tensor([500]), 0.499),
        (torch.tensor([500, 500]), 0.499),
        (torch.tensor([0, 999, 500]), 0.0),
        (torch.tensor([[3.0], [699.0]]), 0.3),
        (torch.tensor([500])[0].clone().expand(3), 0.499),
        (torch.tensor([900, 100]).repeat(2), 0.099),
        (1500, 0.0),
        (-3, 0.999),
        (torch.tensor(1.7, dtype=torch.float64), 0.9973),
    ],
    ids=str,
)
def test_anything_else_is_judged_by_its_value(timestep: Any, share: float) -> None:
    position = step_position(timestep)
    assert position.share == pytest.approx(share)
    assert position.step == round(1000 * position.share)
    assert 0 <= position.share < 1


def test_the_number_of_training_steps_can_be_another() -> None:
    assert step_position(49, train_timesteps=50) == StepPosition(0, 0.0)
    assert step_position(34, train_timesteps=50).share == pytest.approx(0.3)


@pytest.mark.parametrize("steps", [2, 3, 7, 20, 50])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in SCHEDULERS),
        *(("EulerDiscreteScheduler", {"timestep_spacing": spacing}) for spacing in ("leading", "trailing", "linspace")),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ],
    ids=str,
)
def test_every_scheduler_s_list_is_counted_by_its_evaluations(name: str, changes: dict[str, Any], steps: int) -> None:
    plan = make_scheduler(name, **changes)
    if name == "PNDMScheduler" and steps < 4 and not changes:
        pytest.skip("diffusers' PNDM needs four steps to start")
    plan.set_timesteps(steps)
    n = len(plan.timesteps)
    assert n >= steps
    assert [step_position(t) for t in plan.timesteps] == [StepPosition(i, i / n) for i in range(n)]


# --- pipelines --------------------------------------------------------------------------------------------------------


def phases(pipe: Any, summary: atedm.PatchSummary, **options: Any) -> tuple[list[int], list[bool]]:
    """Steps, and whether they are early, of the calls that one image takes."""
    with watched(pipe.unet) as calls:
        image = draw(pipe, guidance_scale=1.0, **options)
    assert torch.isfinite(image).all()
    assert all(call.step is not None for call in calls)
    return [call.step or 0 for call in calls], [call.is_early(summary) for call in calls]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_early_phase_is_a_share_of_the_run_with_every_scheduler(name: str) -> None:
    plan = make_scheduler(name)
    pipe = sdxl_pipeline(small_unet())
    summary = atedm.apply(pipe, "paper")
    pipe.scheduler = plan
    steps, early = phases(pipe, summary, num_inference_steps=10)
    n = len(plan.timesteps)
    assert steps == list(range(n))
    assert early == [Early().is_early(i / n) for i in range(n)]
    assert sum(early) == early_steps(AtEdm(), n) == (3 if n == 10 else 6)
    assert early[0]
    assert not early[-1]
    # Image-to-image starts in the middle of the same list.
    other = sdxl_pipeline(pipe.unet, StableDiffusionXLImg2ImgPipeline)
    other.scheduler = plan
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    steps, early = phases(other, summary, num_inference_steps=10, image=image, strength=0.5)
    n = len(plan.timesteps)
    assert 0 < len(steps) < n
    assert steps == list(range(n - len(steps), n))
    assert early == [Early().is_early(i / n) for i in steps]
    if name != "PNDMScheduler":  # it evaluates its first steps four times, so half its list is not half its steps
        assert steps[0] in (5, 10)
        assert not any(early)


@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.8, 2), (0.5, 5), (0.1, 9)])
@pytest.mark.parametrize("kind", [StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline])
def test_image_to_image_starts_where_it_stands_in_the_full_schedule(kind: Any, strength: float, first: int) -> None:
    pipe = sdxl_pipeline(small_unet(), kind)
    summary = atedm.apply(pipe, "paper")
    options: dict[str, Any] = {"image": torch.rand(1, 3, 64, 64), "strength": strength}
    if kind is StableDiffusionXLInpaintPipeline:
        options |= {"mask_image": torch.ones(1, 1, 64, 64), "height": 64, "width": 64}
    steps, early = phases(pipe, summary, num_inference_steps=10, **options)
    assert steps == list(range(first, 10))
    assert early == [i < 3 for i in steps]


def test_a_run_in_two_parts_counts_as_one() -> None:
    pipe = sdxl_pipeline(small_unet())
    summary = atedm.apply(pipe, "paper")
    steps, early = phases(pipe, summary, num_inference_steps=10, denoising_end=0.2)
    assert (steps, early) == ([0, 1], [True, True])
    refiner = sdxl_pipeline(pipe.unet, StableDiffusionXLImg2ImgPipeline)
    image = torch.randn(1, 4, 16, 16)
    steps, early = phases(refiner, summary, num_inference_steps=10, denoising_start=0.2, image=image)
    assert (steps, early) == (list(range(2, 10)), [True] + 7 * [False])


@pytest.mark.parametrize(
    "custom", [{"timesteps": [999, 990, 980, 970]}, {"sigmas": [14.0, 13.0, 0.2, 0.1, 0.0]}], ids=str
)
def test_a_list_of_one_s_own_is_counted_like_any_other(custom: dict[str, Any]) -> None:
    pipe = sdxl_pipeline(small_unet())
    summary = atedm.apply(pipe, "paper")
    assert phases(pipe, summary, **custom) == ([0, 1, 2, 3], [True, True, False, False])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_early_steps_can_be_another(share: float) -> None:
    pipe = sdxl_pipeline(small_unet())
    summary = atedm.apply(pipe, AtEdm(spare=Early(share)))
    _, early = phases(pipe, summary, num_inference_steps=10)
    assert early == round(10 * share) * [True] + round(10 * (1 - share)) * [False]


@pytest.mark.parametrize("method", ["turbo", "matched"])
def test_without_early_steps_every_step_prunes_alike(method: str) -> None:
    pipe = sdxl_pipeline()
    summary = atedm.apply(pipe, method)
    with watched(pipe.unet) as calls:
        draw(pipe)
    assert [call.step for call in calls] == [0, 1, 2, 3]
    assert all(call.kept.keys() == summary.pruned for call in calls)
