"""Each phase of a patched model exports whole, and its graph gives what the model gives when a pipeline calls it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.export import ExportedProgram

import atedm
from atedm import AtEdm, Early, FixedPhase, Matched
from atedm.method.contract import Method
from atedm.method.correction import Correction
from models import distance, draw, inputs, run, sdxl_pipeline, small_unet, snapshot, tokenizer

pytestmark = pytest.mark.xdist_group("export")  # one process, so that each graph is made once

STEPS = torch.linspace(999, 0, 10)
WORDS = tokenizer().model_max_length
# One attention block, because C++ is compiled, which takes long.
ONE_BLOCK: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (16,),
    "transformer_layers_per_block": (2,),
    "attention_head_dim": (1,),
    "mid_block_type": None,
}


class Case(NamedTuple):
    """A method, one of its phases, and steps that follow one another in that phase."""

    method: Method
    phase: str
    steps: tuple[int, ...]


MATCHED = Case(Matched(), "normal", (0, 1, 2))
SOME_MATRICES = 0.02 * torch.randn(2, 128, 32, generator=torch.Generator().manual_seed(1))
FITTED = Case(Matched(correction=Correction({"mid_block.attentions.0": SOME_MATRICES})), "normal", (0, 1, 2))
NORMAL, EARLY = Case(AtEdm(), "normal", (3, 4)), Case(AtEdm(), "early", (0, 1))
CASES = {"matched": MATCHED, "AT-EDM, normal": NORMAL, "AT-EDM, early": EARLY}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def patched(method: Method, **shape: Any) -> UNet2DConditionModel:
    unet = small_unet(**shape)
    atedm.apply(unet, method)
    return unet


def arguments(unet: UNet2DConditionModel, step: int, memory: Any = None) -> dict[str, Any]:
    call = inputs(unet, words=WORDS) | {"timestep": STEPS[step].clone(), "step": torch.tensor(step)}
    return call if memory is None else call | {"memory": memory}


@functools.cache
def exported(case: Case, one_block: bool = False, /) -> tuple[ExportedProgram, dict[str, Tensor]]:
    """The graph of a phase and its empty memory."""
    phase = FixedPhase(patched(case.method, **(ONE_BLOCK if one_block else {})), case.phase)
    nothing = phase.empty_memory(**arguments(phase.model, 7))
    with torch.no_grad():
        return torch.export.export(phase, (), arguments(phase.model, 7, nothing), strict=False), nothing


Graph = Callable[[dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]


@torch.no_grad()
def check(case: Case, graph: Graph, nothing: dict[str, Tensor], *, share: float, **shape: Any) -> None:
    """Compare a run of a graph with that of the model, by a share of the largest value."""
    unet = patched(case.method, **shape)
    memory = nothing
    for step in case.steps:
        expected = run(unet, STEPS[step], **inputs(unet, words=WORDS))
        sample, memory = graph(arguments(unet, step, memory))
        assert distance(sample, expected) <= share * float(expected.abs().max())
        assert memory.keys() == nothing.keys()
    if case.method.remembers:
        assert len(nothing) == len(unet._atedm.spans)
        for name, value in memory.items():
            expected = unet.get_submodule(name)._atedm.memory.last
            assert distance(value, expected) <= 10 * share * float(expected.abs().max())


# --- Graphs -----------------------------------------------------------------------------------------------------------


@each_case
def test_a_phase_exports_whole_and_gives_what_the_model_gives(case: Case, tmp_path: Path) -> None:
    program, nothing = exported(case)
    torch.export.save(program, tmp_path / "phase.pt2")
    module = torch.export.load(tmp_path / "phase.pt2").module()
    check(case, lambda call: module(**call), nothing, share=1e-6)


@each_case
def test_no_operation_is_left_that_onnx_and_others_lack(case: Case) -> None:
    names = {str(node.target) for node in exported(case)[0].graph.nodes if node.op == "call_function"}
    assert "aten.topk.default" in names
    assert not [name for name in names if "sort" in name]


@torch.no_grad()
def test_step_timestep_and_memory_are_inputs_of_the_graph() -> None:
    program, nothing = exported(MATCHED)
    module, unet = program.module(), small_unet()
    _, memory = module(**arguments(unet, 0, nothing))
    call = arguments(unet, 1, memory)
    there = module(**call)[0]
    changes = ({"step": torch.tensor(8)}, {"timestep": torch.tensor(5.0)}, {"memory": nothing})
    for change in changes:
        assert distance(module(**(call | change))[0], there) > 0.01


def test_the_lattice_of_sampled_rows_moves_with_the_step() -> None:
    unet = patched(AtEdm(spare=None))
    phase = FixedPhase(unet)
    call = inputs(unet, (72, 72), batch=1) | {"timestep": torch.tensor(5.0), "step": torch.tensor(0)}  # 1,296 tokens
    with torch.no_grad():
        module = torch.export.export(phase, (), call, strict=False).module()
        for step in (0, 3):
            call["step"] = torch.tensor(step)
            torch.testing.assert_close(module(**call)[0], phase(**call)[0], rtol=1e-5, atol=1e-5)
        assert distance(phase(**call)[0], phase(**(call | {"step": torch.tensor(0)}))[0]) > 0.01


@each_case
def test_onnx_gives_what_the_model_gives(case: Case, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    one_block = case is not EARLY  # in early steps that one is spared
    program, nothing = exported(case, one_block)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "phase.onnx")
    session = runtime.InferenceSession(tmp_path / "phase.onnx")

    def graph(call: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        flat = {name: value for name, value in call.items() if isinstance(value, Tensor)}
        for name in ("added_cond_kwargs", "memory"):
            flat |= {f"{name}_{key.replace('.', '_')}": value for key, value in call[name].items()}
        # An input that nothing depends on, such as the step where all rows of a map are made, stays one.
        assert {entry.name for entry in session.get_inputs()} == flat.keys()
        sample, *memory = map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in flat.items()}))
        return sample, dict(zip(nothing, memory, strict=True))

    # The whole model is farther off because it is longer: dense, it is 6e-6 from its own ONNX graph.
    check(case, graph, nothing, share=1e-5 if one_block else 2e-5, **(ONE_BLOCK if one_block else {}))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler of C++")
@pytest.mark.parametrize("case", [MATCHED, NORMAL], ids=["matched", "AT-EDM"])
def test_aotinductor_gives_what_the_model_gives(case: Case, tmp_path: Path) -> None:
    program, nothing = exported(case, True)
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "phase.pt2"), inductor_configs=options
    )
    package = torch._inductor.aoti_load_package(path)
    check(case, lambda call: package(**call), nothing, share=1e-5, **ONE_BLOCK)


def test_a_controlnet_exports_too() -> None:
    net = ControlNetModel.from_unet(small_unet(), conditioning_embedding_out_channels=(8, 8)).eval()
    for parameter in net.controlnet_down_blocks.parameters():
        nn.init.normal_(parameter, std=0.1)
    atedm.apply(net, "paper")
    phase = FixedPhase(net)
    call = inputs(net) | {"timestep": torch.tensor(5.0), "step": torch.tensor(7)}
    call["controlnet_cond"] = torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        module = torch.export.export(phase, (), call, strict=False).module()
        torch.testing.assert_close(module(**call), phase(**call), rtol=1e-5, atol=1e-5)
        plain = net(**{name: value for name, value in call.items() if name != "step"}, return_dict=False)
    torch.testing.assert_close(phase(**call)[:2], plain)


# --- Whole images -----------------------------------------------------------------------------------------------------


class Programs(nn.Module):
    """In the place of a U-Net: the graph of the phase that a step is in."""

    def __init__(self, pipe: Any, method: Method, programs: dict[str, Any], nothing: dict[str, Tensor]) -> None:
        super().__init__()
        for name in ("config", "dtype", "device", "add_embedding"):  # what a pipeline asks of its U-Net
            setattr(self, name, getattr(pipe.unet, name))
        self.method, self.programs, self.nothing, self.memory = method, programs, nothing, nothing
        self.timesteps = lambda: pipe.scheduler.timesteps
        self.phases: list[str] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any, **_: Any
    ) -> tuple[Tensor]:
        step = int((self.timesteps() == timestep).nonzero()[0])
        phase = "early" if self.method.is_early(step / len(self.timesteps())) else "normal"
        self.phases.append(phase)
        sample, self.memory = self.programs[phase](
            sample=sample,
            timestep=timestep.clone(),
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=added_cond_kwargs,
            step=torch.tensor(step),
            memory=self.nothing if step == 0 else self.memory,
        )
        return (sample,)


@pytest.mark.parametrize("cases", [(MATCHED,), (FITTED,), (NORMAL, EARLY)], ids=["matched", "fitted", "AT-EDM"])
def test_a_pipeline_draws_the_same_image_with_exported_phases(cases: tuple[Case, ...]) -> None:
    method = cases[0].method
    pipe = sdxl_pipeline(small_unet())
    with atedm.pruned(pipe, method):
        images = [draw(pipe, seed, num_inference_steps=5) for seed in (0, 1)]
    dense = draw(pipe, num_inference_steps=5)
    programs = {case.phase: exported(case)[0].module() for case in cases}
    pipe.unet = Programs(pipe, method, programs, exported(cases[0])[1])
    for seed, image in enumerate(images):  # a second image, because nothing may leak from the first
        torch.testing.assert_close(draw(pipe, seed, num_inference_steps=5), image, rtol=1e-4, atol=1e-4)
    assert set(pipe.unet.phases) == {case.phase for case in cases}
    assert distance(images[0], dense) > 0.1


# --- The model itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disturb", ["call", "export", "error"])
@torch.no_grad()
def test_the_model_works_on_as_if_its_phase_had_never_been_fixed(disturb: str) -> None:
    undisturbed, unet = patched(Matched()), patched(Matched())
    phase = FixedPhase(unet)
    call = arguments(unet, 5, phase.empty_memory(**arguments(unet, 5)))
    before = snapshot(unet)
    for index, timestep in enumerate(STEPS[:3]):
        if disturb == "call":
            phase(**call)
        elif disturb == "export" and index == 1:
            torch.export.export(phase, (), call, strict=False)
        elif disturb == "error":
            with pytest.raises(RuntimeError):
                phase(**(call | {"sample": torch.zeros(2, 5, 16, 16)}))
        assert torch.equal(run(unet, timestep), run(undisturbed, timestep))
    if disturb != "export":  # torch.export leaves marks of its own on modules
        assert snapshot(unet) == before
    assert unet._atedm.fixed is None
    assert type(unet._atedm.step) is Tensor  # none of those of a trace, which have no values
    atedm.remove(unet)
    assert torch.equal(run(unet), run(small_unet()))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_what_has_no_phases_or_not_that_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not patched.*atedm\.apply"):
        FixedPhase(small_unet())
    with pytest.raises(TypeError, match="found a Linear"):
        FixedPhase(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="did you mean 'early'"):
        FixedPhase(patched(AtEdm()), "erly")
    with pytest.raises(ValueError, match=r"Matched pruning has no early steps.*'normal'"):
        FixedPhase(patched(Matched()), "early")
    with pytest.raises(ValueError, match=r"AT-EDM has no early steps.*'normal'"):
        FixedPhase(patched(AtEdm(spare=None)), "early")
    with pytest.raises(ValueError, match=r"AT-EDM has no normal steps.*'early'"):
        FixedPhase(patched(AtEdm(spare=Early(share=1.0))))
    phase = FixedPhase(patched(AtEdm()))
    atedm.remove(phase.model)
    with pytest.raises(ValueError, match="not patched"):
        phase(**arguments(phase.model, 0))


def test_what_would_be_frozen_into_a_graph_is_refused() -> None:
    unet = patched(Matched())
    phase = FixedPhase(unet)
    call = arguments(unet, 0)
    for step in (3, torch.tensor(3.0), torch.tensor([3])):
        with pytest.raises(ValueError, match="step must be an int64 tensor"):
            phase(**(call | {"step": step}))
    with pytest.raises(ValueError, match="timestep must be a tensor"):
        phase(**(call | {"timestep": 999}))
    with pytest.raises(ValueError, match=r"remembers.*empty_memory.*own_update_share=0"):
        torch.export.export(phase, (), call, strict=False)
    for memory in ({}, phase.empty_memory(**(call | inputs(unet, batch=1, words=WORDS)))):  # of nothing, of one image
        with pytest.raises(ValueError, match="memory must have"):
            torch.export.export(phase, (), call | {"memory": memory}, strict=False)
    assert FixedPhase(patched(AtEdm())).empty_memory(**call) == {}
    assert FixedPhase(patched(Matched(own_update_share=0.0))).empty_memory(**call) == {}


def test_a_protected_region_is_looked_at_before_the_graph_is_made() -> None:
    unet = small_unet()
    mask = torch.zeros(64, 64)
    mask[:24, :24] = 1
    atedm.apply(unet, AtEdm(spare=None), protect=mask)
    phase = FixedPhase(unet)
    call = arguments(unet, 0)
    with pytest.raises(ValueError, match=r"protected.*call the atedm\.FixedPhase once"):
        torch.export.export(phase, (), call, strict=False)
    with torch.no_grad():
        expected = phase(**call)[0]
        module = torch.export.export(phase, (), call, strict=False).module()
        torch.testing.assert_close(module(**call)[0], expected, rtol=1e-5, atol=1e-5)
        assert distance(expected, FixedPhase(patched(AtEdm(spare=None)))(**call)[0]) > 0.01
