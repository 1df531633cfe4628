"""A plan on a MODEL of ComfyUI, on a stand-in of its patch points; `tests/comfyui` has the same in the application."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import comfyui_standin as standin
from atedm.hosts.comfyui import prune
from atedm.method.matched import Matched
from atedm.plans.in_comfyui import SAMPLERS, advice, apply_plan
from atedm.plans.plan import Cache, Plan
from atedm.plans.schedulers import SCHEDULERS
from comfyui_standin import Guider, ModelPatcher

SIGMAS = torch.tensor([10.0, 8.0, 6.0, 3.0, 1.0, 0.0])
FITS: dict[str, Any] = {
    "in_channels": 4,
    "block_out_channels": [standin.CHANNELS] * 2,
    "cross_attention_dim": standin.WORDS,
    "transformer_layers_per_block": [1, 3],
}
FORECAST = Plan(FITS, 5, cache=Cache(3, branch=None))


def model() -> ModelPatcher:
    torch.manual_seed(0)
    return ModelPatcher(standin.BaseModel(standin.UNetModel().eval()))


def draw(patcher: ModelPatcher, together: bool = True, sigmas: torch.Tensor = SIGMAS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    contexts = [torch.randn(1, 5, standin.WORDS, generator=generator) for _ in range(2)]
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(2))
    return Guider(patcher, contexts, together=together).sample(noise, sigmas)


def calls(patcher: ModelPatcher) -> list[int]:
    return patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].seen  # type: ignore[no-any-return, union-attr, index]


def test_a_plan_that_prunes_is_the_pruning_node() -> None:
    plan = Plan(FITS, 5, method=Matched(0.6))
    assert torch.equal(draw(apply_plan(model(), plan)), draw(prune(model(), Matched(0.6))))


@torch.no_grad()
def test_steps_are_forecast_on_the_line_through_the_last_two() -> None:
    assert FORECAST.full_steps() == (0, 2, 3)
    patcher = apply_plan(model(), FORECAST)
    found = draw(patcher)
    assert len(calls(patcher)) == 3
    # The same by hand: steps 1 and 4 are not run.
    network, x = model().model.diffusion_model, None
    generator = torch.Generator().manual_seed(1)
    words = torch.cat([torch.randn(1, 5, standin.WORDS, generator=generator) for _ in range(2)])
    x = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(2)) * SIGMAS[0]
    outputs: dict[int, torch.Tensor] = {}
    for step, (sigma, after) in enumerate(itertools.pairwise(SIGMAS)):
        if step == 1:
            output = outputs[0]
        elif step == 4:
            output = outputs[3] + (outputs[3] - outputs[2])
        else:
            output = network(torch.cat([x, x]) / (1 + sigma), sigma.view(1), context=words)
            outputs[step] = output
        x = x + output.mean(0, keepdim=True) * (after - sigma)
    torch.testing.assert_close(found, x)


def test_guidance_in_one_batch_or_two_is_the_same_and_a_second_run_too() -> None:
    patcher = apply_plan(model(), replace(FORECAST, method=Matched(0.6)))
    found = draw(patcher)
    torch.testing.assert_close(draw(patcher, together=False), found)
    assert torch.equal(draw(patcher), found)


def test_runs_of_other_lengths_and_models_beside_it_are_well() -> None:
    plain = model()
    before = draw(plain)
    patcher = apply_plan(plain, FORECAST)
    assert not torch.equal(draw(patcher), before)
    assert draw(patcher, sigmas=torch.tensor([10.0, 0.0])).isfinite().all()
    assert torch.equal(draw(plain), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_channels": 9}, "its in_channels is 9, here it is 4"),
        ({"transformer_layers_per_block": [1, 2]}, r"its transformer_layers_per_block is \[2\], here it is \[3\]"),
        ({"block_out_channels": [320, 640, 1280]}, r"its block_out_channels is \[320, 640, 1280\]"),
    ],
)
def test_a_plan_for_another_model_is_refused_by_what_differs(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_plan(model(), Plan(FITS | changed, 5))


def test_what_cannot_be_done_there_is_refused_and_what_is_left_to_others_is_said() -> None:
    with pytest.raises(ValueError, match="takes DeepCache"):
        apply_plan(model(), Plan(FITS, 5, cache=Cache(3, branch=0)))
    other = model()
    other.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="is for a U-Net"):
        apply_plan(other, FORECAST)
    said = advice(Plan(FITS, 11, scheduler="dpm++", guidance=3.0, lora="lora"))
    assert "Set the sampler to 11 steps, sampler: dpmpp_2m, cfg 3." in said
    assert "Load its LoRA before this node: lora." in said
    said = advice(Plan(FITS, 4, fit="fit.safetensors"))
    assert "Its fitted refill is for diffusers; this node prunes without it." in said
    assert "your own cfg, which the plan leaves open" in advice(FORECAST)
    assert SAMPLERS.keys() == SCHEDULERS.keys()
