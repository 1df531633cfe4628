# ruff: noqa: I001
"""U-Nets in the real application: workflows through its executor, with the node and without."""

import engine  # first: it skips these where there is no application, and brings it up where there is

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management as management
import comfy.model_patcher
import comfy.patcher_extension
import pytest
import small
import torch
from small import SHELF, TAKEN, draw, seen_tokens, workflow

import comfyui_standin as standin
from atedm.hosts.comfyui import pruning_of

MODELS = pytest.mark.parametrize("model", ["sdxl", "sd1"])
METHODS = pytest.mark.parametrize("method", ["matched", "AT-EDM", "AT-EDM for few steps"])


@pytest.fixture(autouse=True)
def shelf() -> Iterator[None]:
    yield from small.unets_on_the_shelf()


@pytest.fixture
def running() -> Any:
    return engine.Engine()


@MODELS
def test_rate_0_changes_no_bit_and_a_second_run_is_equal(running: Any, model: str) -> None:
    dense = draw(running, workflow(model))
    assert torch.equal(draw(running, workflow(model, pruned={"rate": 0.0})), dense)
    pruned = draw(running, workflow(model, pruned={}))
    assert not torch.equal(pruned, dense)
    assert pruned.isfinite().all()
    assert torch.equal(draw(engine.Engine(), workflow(model, pruned={})), pruned)
    assert torch.equal(draw(engine.Engine(), workflow(model)), dense)


@METHODS
def test_layers_run_on_fewer_tokens(running: Any, method: str) -> None:
    seen = seen_tokens(SHELF["sdxl"])
    draw(running, workflow())
    everything = sum(seen)
    assert set(seen) == {64, 16}
    seen.clear()
    draw(running, workflow(pruned={"method": method}))
    assert sum(seen) < everything
    assert min(seen) < 16


def test_at_edm_says_what_works_where_it_cannot(running: Any) -> None:
    said = running.run(workflow("sd1", pruned={"method": "AT-EDM"}))
    event, what = said[-1]
    assert event == "execution_error"
    assert what["node_type"] == "AtedmTokenPruning"
    assert "'matched' works here" in what["exception_message"]


def test_another_model_and_the_model_itself_are_untouched(running: Any) -> None:
    SHELF["other"] = small.sdxl(seed=5)
    before, other = draw(running, workflow()), draw(running, workflow("other"))
    options = copy.deepcopy(SHELF["sdxl"].model_options)
    draw(running, workflow(pruned={}))
    assert torch.equal(draw(engine.Engine(), workflow()), before)
    assert torch.equal(draw(engine.Engine(), workflow("other")), other)
    assert SHELF["sdxl"].object_patches == {}
    assert SHELF["sdxl"].model_options == options
    assert pruning_of(SHELF["sdxl"]) is None
    for kind in (attention.SpatialTransformer, attention.BasicTransformerBlock, attention.CrossAttention):
        assert kind.forward.__module__ == attention.__name__
    management.unload_all_models()
    for module in SHELF["sdxl"].model.modules():
        assert getattr(vars(module).get("forward", module.forward), "__func__", None) is type(module).forward


def test_images_of_different_sizes_in_turn(running: Any) -> None:
    sizes = ((128, 128), (128, 192), (96, 160))
    alone = [draw(engine.Engine(), workflow(pruned={}, size=size)) for size in sizes]
    for size, expected in [*zip(sizes, alone, strict=True)] * 2:
        TAKEN.clear()
        found = draw(engine.Engine() if size == sizes[0] else running, workflow(pruned={}, size=size, seed=3))
        assert torch.equal(found, expected)


def test_each_image_of_a_batch_is_its_own(running: Any) -> None:
    SHELF["sdxl"] = small.sdxl(dtype=torch.float64)  # or rounding grows over the steps, pruned or not
    batch = draw(running, workflow(pruned={}, batch=2))
    assert batch.shape[0] == 2
    assert not torch.equal(batch[0], batch[1])
    # The first of a batch has the noise of an image alone.
    torch.testing.assert_close(draw(running, workflow(pruned={}))[0], batch[0], rtol=1e-4, atol=1e-3)


def test_conditions_together_and_apart_draw_the_same(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    SHELF["sdxl"] = small.sdxl(dtype=torch.float64)
    SHELF["negative"] = small.conditioning(2)  # of one length, so that they go into one batch
    seen = seen_tokens(SHELF["sdxl"])
    together = draw(running, workflow(pruned={}))
    calls = len(seen)
    # No memory for a batch of both, and enough for attention, which asks in its own way.
    monkeypatch.setattr(management, "get_free_memory", lambda _=None, both=False: (2**30, 2**30) if both else 0)
    seen.clear()
    apart = draw(engine.Engine(), workflow(pruned={}))
    assert len(seen) == 2 * calls
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_sde", "dpm_2_ancestral", "uni_pc", "lcm"])
def test_samplers(running: Any, sampler: str) -> None:
    assert draw(running, workflow(pruned={}, sampler_name=sampler, scheduler="karras")).isfinite().all()


def test_image_to_image_prunes_as_late_steps_do(running: Any) -> None:
    seen = seen_tokens(SHELF["sdxl"])
    draw(running, workflow(pruned={"early_strength": 0.0}, denoise=0.5, steps=2))
    late = set(seen)
    seen.clear()
    draw(running, workflow(pruned={"early_strength": 0.0}, steps=2))
    assert 64 not in late
    assert 64 in seen


@METHODS
def test_cancel_in_the_middle(running: Any, method: str) -> None:
    first = draw(running, workflow(pruned={"method": method}))
    layer = SHELF["sdxl"].model.diffusion_model.middle_block[1].transformer_blocks[1]
    times = iter(range(100))

    def cancel(*_: Any) -> None:
        if next(times) == 3:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    hook = layer.ff.register_forward_hook(cancel)
    assert running.run(workflow(pruned={"method": method}, seed=4))[-1][0] == "execution_interrupted"
    hook.remove()
    assert torch.equal(draw(engine.Engine(), workflow(pruned={"method": method})), first)


def test_kept_tokens_are_shown(running: Any) -> None:
    prompt = workflow(pruned={}, batch=2, size=(128, 192))
    prompt["kept"] = {
        "class_type": "AtedmKeptTokens",
        "inputs": {"model": ["pruned", 0], "samples": ["sampler", 0], "block": 0, "step": -1},
    }
    prompt["take"]["inputs"] = {"name": "out", "image": ["kept", 0]}
    shares = draw(running, prompt)
    assert shares.shape[0] == 2
    assert shares.shape[1] / shares.shape[2] == 128 / 192
    prompt["kept"]["inputs"] |= {"step": 1, "block": 999}
    step = draw(running, prompt)
    assert set(step.unique().tolist()) == {0.0, 1.0}
    prompt["white"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 192, "height": 128, "batch_size": 2, "color": 0xFFFFFF},
    }
    prompt["kept"]["inputs"]["image"] = ["white", 0]
    over = draw(running, prompt)
    assert over.shape == (2, 128, 192, 3)
    assert over.min() == pytest.approx(0.15)
    assert over.max() == 1


def test_kept_tokens_say_what_is_missing(running: Any) -> None:
    prompt = workflow()
    prompt["kept"] = {
        "class_type": "AtedmKeptTokens",
        "inputs": {"model": ["model", 0], "samples": ["sampler", 0], "block": 0, "step": -1},
    }
    prompt["take"]["inputs"] = {"name": "out", "image": ["kept", 0]}
    said = running.run(prompt)
    assert "not pruned" in said[-1][1]["exception_message"]


def test_the_stand_in_has_the_signatures_of_the_application() -> None:
    pairs = [
        (standin.CrossAttention.forward, attention.CrossAttention.forward),
        (standin.BasicTransformerBlock.forward, attention.BasicTransformerBlock.forward),
        (standin.SpatialTransformer.forward, attention.SpatialTransformer.forward),
        (standin.UNetModel.forward, openaimodel.UNetModel.forward),
        *(
            (getattr(standin.ModelPatcher, name), getattr(comfy.model_patcher.ModelPatcher, name))
            for name in ("clone", "add_object_patch", "get_model_object", "set_attachments", "get_attachment")
        ),
        (standin.BaseModel.apply_model, comfy.model_base.BaseModel.apply_model),
        (standin.ModelPatcher.add_wrapper_with_key, comfy.model_patcher.ModelPatcher.add_wrapper_with_key),
    ]
    for ours, theirs in pairs:
        names = [[*inspect.signature(function).parameters] for function in (ours, theirs)]
        assert names[0] == names[1], theirs
    outer = inspect.signature(comfy.samplers.CFGGuider.outer_sample).parameters
    assert [*outer][:5] == ["self", "noise", "latent_image", "sampler", "sigmas"]
    assert comfy.patcher_extension.WrappersMP.OUTER_SAMPLE == "outer_sample"
    assert comfy.patcher_extension.WrappersMP.APPLY_MODEL == "apply_model"
