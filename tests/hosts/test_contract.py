"""The contract on U-Nets: what all hosts promise, whole images by schedulers, compilation, processors and FreeU."""

from inspect import signature
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from torch import Tensor, nn

from atedm.method.contract import Method
from contract import RUNS, SIZES, Contract, case_of, methods
from contract import said as said
from models import run, sd1_unet, sdxl_unet, small_unet

SHAPES = {
    "small": small_unet,
    "SDXL": lambda: sdxl_unet(block_out_channels=(16, 16, 16), attention_head_dim=(1, 2, 2)),
    "SD 1": sd1_unet,
    "five heads, odd width": lambda: small_unet(block_out_channels=(16, 40), attention_head_dim=(1, 5)),
}
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
SCHEDULERS = st.sampled_from(
    [
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,  # asks twice for a step
        LCMScheduler,
    ]
)


def noise_from(scheduler: Any, generator: torch.Generator) -> dict[str, torch.Generator]:
    """What tells a scheduler where to take noise from, if it takes any."""
    return {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}


@torch.no_grad()
def generated(unet: UNet2DConditionModel, scheduler_class: Any, steps: int, size: tuple[int, int]) -> Tensor:
    """The latents of an image, denoised as a pipeline does it, with guidance."""
    scheduler = scheduler_class()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(steps)
    latents = torch.randn(1, 4, *size, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        both = scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), timestep).to(unet.dtype)
        without, with_prompt = run(unet, timestep, size=size, sample=both).float().chunk(2)
        noise = without + 3 * (with_prompt - without)
        latents = scheduler.step(noise, timestep, latents, **noise_from(scheduler, generator)).prev_sample
    return latents


class OnUnets(Contract):
    """One U-Net that all is done to, and its twin."""

    @staticmethod
    @torch.no_grad()
    def drawn(model: Any, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> list[Tensor]:
        """Every step of a run, its timesteps views of one list, as pipelines hand them over."""
        return [run(model, timestep, size=size, batch=batch) for timestep in torch.tensor(timesteps)]

    @staticmethod
    def last_layer(model: Any) -> nn.Module:
        layers = [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]
        return layers[-1].attn2

    @initialize(
        shape=st.sampled_from([*SHAPES]),
        dtype=DTYPES,
        method=st.none() | methods(),
        compiles=st.sampled_from([False] * 9 + [True]),
    )
    def begin(self, shape: str, dtype: torch.dtype, method: Method | None, compiles: bool) -> None:
        self.may_compile = compiles
        self.begin_with(SHAPES[shape]().to(dtype), method)

    @rule(scheduler_class=SCHEDULERS, steps=st.integers(1, 4), size=SIZES)
    def generate(self, scheduler_class: Any, steps: int, size: tuple[int, int]) -> None:
        ours, theirs = (generated(unet, scheduler_class, steps, size) for unet in (self.model, self.fresh()))
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
        self.note("generate")

    @precondition(lambda self: self.may_compile)
    @rule(timesteps=RUNS)
    def compile(self, timesteps: tuple[int, ...]) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend="eager")  # traced and guarded as ever, and the same bits
        ours, theirs = (self.drawn(unet, timesteps, (16, 16), 2) for unet in (compiled, self.fresh()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        self.may_compile = False  # it takes seconds
        self.note("compile")

    @rule(fused=st.booleans())
    def set_the_processor(self, fused: bool) -> None:
        for unet in (self.model, self.twin):
            unet.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())
        self.note("processor")

    @rule(on=st.booleans())
    def free_u(self, on: bool) -> None:
        for unet in (self.model, self.twin):
            unet.enable_freeu(0.9, 0.2, 1.3, 1.4) if on else unet.disable_freeu()
        self.note("FreeU")


ContractTest = case_of(OnUnets)
