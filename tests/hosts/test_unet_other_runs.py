"""Runs that are no plain denoising: from clean to noise, and inside the transforms of torch.func."""

import pytest
import torch
from diffusers import DDIMInverseScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

import atedm
from atedm import AtEdm, Early, Matched
from atedm.hosts.runs import Run
from atedm.method.contract import Method
from models import inputs, run, sdxl_unet, small_unet, watched

METHODS = pytest.mark.parametrize("method", [AtEdm(), Matched()], ids=["AT-EDM", "matched"])


@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_run_from_clean_to_noise_is_early_at_its_end(inference_mode: bool) -> None:
    with torch.inference_mode(inference_mode):
        located = [Run().locate(t)[0] for t in torch.tensor([1, 101, 201, 301, 401, 501, 601, 701, 801, 901])]
    assert [position.step for position in located] == [*range(10)]
    assert [position.share for position in located] == [i / 10 for i in range(9, -1, -1)]


def test_inversion_spares_its_noisy_steps() -> None:
    unet = small_unet()
    summary = atedm.apply(unet, AtEdm(spare=Early(share=0.3)))
    scheduler = DDIMInverseScheduler()
    scheduler.set_timesteps(10)
    with watched(unet) as calls:
        for timestep in scheduler.timesteps:
            run(unet, timestep)
    assert [call.is_early(summary) for call in calls] == [False] * 7 + [True] * 3


def test_what_is_remembered_follows_a_run_whichever_way_it_goes() -> None:
    known = Run()
    assert [known.locate(t)[1] for t in torch.tensor([1, 501, 999])] == [False, True, True]
    assert [known.locate(t)[1] for t in torch.tensor([999, 501, 1])] == [False, True, True]


@METHODS
@pytest.mark.parametrize("timestep", [500, torch.tensor(500), torch.tensor([999, 500, 1])[1]])
def test_forward_mode_differentiation(method: Method, timestep: int | Tensor) -> None:
    unet = sdxl_unet()
    unet.set_attn_processor(AttnProcessor())  # torch has no forward mode for fused attention
    call = inputs(unet)
    sample, direction = call.pop("sample").double(), torch.randn(2, 4, 16, 16, dtype=torch.float64)
    unet.double()
    call = {name: _double(value) for name, value in call.items()}
    with atedm.pruned(unet, method):

        def step(x: Tensor) -> Tensor:
            output: Tensor = unet(x, timestep, **call).sample
            return output

        slope = torch.func.jvp(step, (sample,), (direction,))[1]
        with torch.no_grad():
            expected = (step(sample + 1e-8 * direction) - step(sample - 1e-8 * direction)) / 2e-8
    # Where a token is on the edge of being kept, the difference quotient jumps; hardly any is.
    assert (slope - expected).abs().median() < 1e-4 * expected.abs().median()


@METHODS
def test_the_time_can_be_differentiated_too(method: Method) -> None:
    unet = sdxl_unet()
    unet.set_attn_processor(AttnProcessor())
    call = inputs(unet)
    sample = call.pop("sample")
    with atedm.pruned(unet, method):
        both = (sample, torch.tensor(500.0))
        slope = torch.func.jvp(lambda x, t: unet(x, t, **call).sample, both, (torch.zeros_like(sample), torch.ones(())))
    assert slope[1].isfinite().all()
    assert slope[1].abs().max() > 0


@METHODS
def test_vmap_gives_what_a_loop_gives(method: Method) -> None:
    unet = sdxl_unet().double()
    call = {name: _double(value) for name, value in inputs(unet, batch=1).items()}
    samples = torch.randn(3, 1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    del call["sample"]
    with atedm.pruned(unet, method), torch.no_grad():
        together = torch.func.vmap(lambda x: unet(x, 500, **call).sample)(samples)
        apart = torch.stack([unet(x, 500, **call).sample for x in samples])
        torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match=r"torch\.func\.vmap runs over; give the timestep as a number"):
            torch.func.vmap(lambda x, t: unet(x, t, **call).sample)(samples, torch.tensor([900, 500, 100]))


def _double(value: object) -> object:
    if isinstance(value, dict):
        return {name: _double(part) for name, part in value.items()}
    return value.double() if isinstance(value, Tensor) else value
