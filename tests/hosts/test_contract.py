"""Contract: whatever is done, in any order, pruned calls are those of a fresh patch, and removal leaves no trace.

Hypothesis makes up sequences of what people do to a U-Net, on one that is patched and unpatched on the way and on a
twin that never is. `ATEDM_SEQUENCES=2000 pytest -n 0 -s tests/hosts/test_contract.py` runs more of them than CI
does, and says what was done.
"""

import copy
import io
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
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
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig
from torch import Tensor

import atedm
from atedm import METHODS, AtEdm, Early, Matched
from atedm.hosts.unet_spans import find_spans
from atedm.method.contract import Method
from models import run, sd1_unet, sdxl_unet, small_unet, snapshot

SEQUENCES = int(os.environ.get("ATEDM_SEQUENCES", "12"))
DONE: Counter[str] = Counter()
"""What was done, over all sequences."""

SHAPES = {
    "small": small_unet,
    "SDXL": lambda: sdxl_unet(block_out_channels=(16, 16, 16), attention_head_dim=(1, 2, 2)),
    "SD 1": sd1_unet,
    "five heads, odd width": lambda: small_unet(block_out_channels=(16, 40), attention_head_dim=(1, 5)),
}
SIZES = st.sampled_from([(16, 16), (8, 24), (10, 14), (20, 12)])
RUNS = st.sampled_from([(999,), (1,), (999, 500, 1), (801, 601, 401, 201), (999, 1)])
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
RATES = st.sampled_from([0.0, 0.2, 0.5, 0.63, 0.9])


def by_step(view: atedm.View) -> Tensor:
    """A ranking that is another one in every step."""
    return torch.sin(view.tokens.float().square().mean(-1) * (1 + view.step))


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """Return any method, some of it changed."""
    method = replace(draw(st.sampled_from([*METHODS.values()])), rate=draw(RATES))  # type: ignore[type-var]
    if isinstance(method, Matched):
        return replace(
            method,
            own_update_share=draw(st.sampled_from([0.0, 0.5])),
            cover_share=draw(st.sampled_from([0.0, 0.4, 1.0])),
        )
    assert isinstance(method, AtEdm)
    return replace(
        method,
        where=draw(st.sampled_from([method.where, atedm.everywhere])),
        spare=draw(st.sampled_from([None, Early(), Early(0.6, "L-M")])),
        rank=draw(st.sampled_from([None, by_step])),
        sample=draw(st.sampled_from([None, 256])),
    )


class Interrupted(BaseException):
    """Like Ctrl+C in the middle of a step."""


@contextmanager
def raising(unet: UNet2DConditionModel, error: BaseException) -> Iterator[None]:
    """Raise in the last transformer layer, when some blocks have run and some have not."""
    layers = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]

    def fail(*_: Any) -> None:
        raise error

    hook = layers[-1].attn2.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def drawn(unet: UNet2DConditionModel, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> list[Tensor]:
    """Every step of a run, its timesteps views of one list, as pipelines hand them over."""
    return [run(unet, timestep, size=size, batch=batch) for timestep in torch.tensor(timesteps)]


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


class Contract(RuleBasedStateMachine):
    """One U-Net that all is done to, and its twin."""

    unet: UNet2DConditionModel
    twin: UNet2DConditionModel
    method: Method | None

    @initialize(
        shape=st.sampled_from([*SHAPES]),
        dtype=DTYPES,
        method=st.none() | methods(),
        compiles=st.sampled_from([False] * 9 + [True]),
    )
    def begin(self, shape: str, dtype: torch.dtype, method: Method | None, compiles: bool) -> None:
        self.unet = SHAPES[shape]().to(dtype)
        self.twin = copy.deepcopy(self.unet)
        self.may_compile = compiles
        self.method, self.loras = None, 0
        if method is not None:
            self.apply_or_be_refused(method)

    def note(self, what: str) -> None:
        DONE[what] += 1

    # --- on and off

    @precondition(lambda self: self.method is None)
    @rule(method=methods())
    def apply(self, method: Method) -> None:
        self.apply_or_be_refused(method)

    def apply_or_be_refused(self, method: Method) -> None:
        before = snapshot(self.unet)
        half = replace(method, rate=0.5)  # type: ignore[type-var]
        if any(half.count(place, 100) < 100 for place, _ in find_spans(self.unet).values()):
            atedm.apply(self.unet, method)
            self.method = method
            self.note("apply")
            return
        with pytest.raises(ValueError, match="nothing to prune"):  # one layer a block, or none but the second level
            atedm.apply(self.unet, method)
        assert snapshot(self.unet) == before
        self.note("refused")

    @precondition(lambda self: self.method is not None)
    @rule()
    def remove(self) -> None:
        atedm.remove(self.unet)
        self.method = None
        assert all("atedm" not in name for module in self.unet.modules() for name in vars(module))
        assert {type(a) for a in self.unet.modules()} == {type(a) for a in self.twin.modules()}
        self.note("remove")

    # --- use

    @rule(timesteps=RUNS, size=SIZES, batch=st.sampled_from([1, 2, 3]))
    def draw(self, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> None:
        self.draws_as_a_fresh_one(timesteps, size, batch)

    @precondition(lambda self: self.method is not None)
    @rule(timesteps=RUNS, size=SIZES, batch=st.sampled_from([1, 2, 3]))
    def draw_pruned(self, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> None:
        self.draws_as_a_fresh_one(timesteps, size, batch)

    def fresh(self) -> UNet2DConditionModel:
        """The untouched twin, patched just now if ours is."""
        fresh = copy.deepcopy(self.twin)
        if self.method is not None:
            atedm.apply(fresh, self.method)
        return fresh

    def draws_as_a_fresh_one(self, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> None:
        ours, theirs = (drawn(unet, timesteps, size, batch) for unet in (self.unet, self.fresh()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        self.note("draw pruned" if self.method is not None else "draw dense")

    @rule(scheduler_class=SCHEDULERS, steps=st.integers(1, 4), size=SIZES)
    def generate(self, scheduler_class: Any, steps: int, size: tuple[int, int]) -> None:
        ours, theirs = (generated(unet, scheduler_class, steps, size) for unet in (self.unet, self.fresh()))
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
        self.note("generate")

    @precondition(lambda self: self.may_compile)
    @rule(timesteps=RUNS)
    def compile(self, timesteps: tuple[int, ...]) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.unet, backend="eager")  # traced and guarded as ever, and the same bits
        ours, theirs = (drawn(unet, timesteps, (16, 16), 2) for unet in (compiled, self.fresh()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        self.may_compile = False  # it takes seconds
        self.note("compile")

    @rule(error=st.sampled_from([ValueError("in the middle"), Interrupted()]), timesteps=RUNS)
    def raise_in_the_middle(self, error: BaseException, timesteps: tuple[int, ...]) -> None:
        with raising(self.unet, error), pytest.raises(type(error)):
            drawn(self.unet, timesteps, (16, 16), 2)
        self.note("raise")

    @precondition(lambda self: self.method is not None)
    @rule(timesteps=RUNS)
    def look_on(self, timesteps: tuple[int, ...]) -> None:
        with atedm.recorded(self.unet) as recording:
            drawn(self.unet, timesteps, (16, 16), 2)
        assert recording.evaluations == len(timesteps)
        self.note("look on")

    @rule(size=SIZES)
    def leave_a_run_unfinished(self, size: tuple[int, int]) -> None:
        drawn(self.unet, (999, 800, 600, 400, 200)[: 1 + size[0] % 3], size, 1)
        self.note("leave unfinished")

    # --- what else is done to models

    @rule()
    def copy(self) -> None:
        self.unet = copy.deepcopy(self.unet)
        self.note("copy")

    @precondition(lambda self: self.loras == 0)
    @rule()
    def pickle(self) -> None:
        file = io.BytesIO(pickle.dumps(self.unet))
        self.unet = pickle.load(file)
        self.note("pickle")

    @rule(fused=st.booleans())
    def set_the_processor(self, fused: bool) -> None:
        for unet in (self.unet, self.twin):
            unet.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())
        self.note("processor")

    @precondition(lambda self: self.loras < 2)
    @rule()
    def add_a_lora(self) -> None:
        for unet in (self.unet, self.twin):
            torch.manual_seed(self.loras)
            target = ["to_q", "to_k", "to_v"]
            unet.add_adapter(LoraConfig(r=2, target_modules=target, init_lora_weights=False), f"lora{self.loras}")
            unet.to(next(unet.parameters()).dtype)
        self.loras += 1
        self.note("LoRA on")

    @precondition(lambda self: self.loras > 0)
    @rule(on=st.booleans())
    def switch_loras(self, on: bool) -> None:
        for unet in (self.unet, self.twin):
            unet.enable_adapters() if on else unet.disable_adapters()
        self.note("LoRA switched")

    @rule(on=st.booleans())
    def free_u(self, on: bool) -> None:
        for unet in (self.unet, self.twin):
            unet.enable_freeu(0.9, 0.2, 1.3, 1.4) if on else unet.disable_freeu()
        self.note("FreeU")

    # --- always

    @invariant()
    def no_weight_ever_changes(self) -> None:
        if hasattr(self, "unet"):
            ours, theirs = self.unet.state_dict(), self.twin.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def teardown(self) -> None:
        if not hasattr(self, "unet"):
            return
        if self.method is not None:
            atedm.remove(self.unet)
        ours, theirs = (drawn(unet, (999, 1), (16, 16), 2) for unet in (self.unet, self.twin))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        self.note("sequences")


ContractTest = Contract.TestCase
ContractTest.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
)


@pytest.fixture(scope="module", autouse=True)
def said() -> Iterator[None]:
    yield
    print("\n" + ", ".join(f"{what}: {count}" for what, count in sorted(DONE.items())))
