# ruff: noqa: I001
"""FLUX, SD3 and Qwen-Image in the real application: workflows through its executor, with the node and without."""

import engine  # first: it skips these where there is no application, and brings it up where there is

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import comfy.controlnet
import comfy.ldm.flux.layers as layers
import comfy.ldm.flux.model
import comfy.model_management as management
import pytest
import small
import torch
from small import SHELF, TAKEN, draw, workflow

import comfyui_standin_flux as standin
from atedm.hosts.comfyui import pruning_of

MODELS = pytest.mark.parametrize("model", ["flux", "sd3", "qwen"])


@pytest.fixture(autouse=True)
def shelf() -> Iterator[None]:
    SHELF.clear()
    SHELF.update(positive=small.conditioning(1), negative=small.conditioning(2, words=9))
    SHELF.update(flux=small.flux(), sd3=small.sd3(), qwen=small.qwen())
    torch.set_num_threads(1)
    yield
    SHELF.clear()
    TAKEN.clear()
    management.unload_all_models()


@pytest.fixture
def running() -> Any:
    return engine.Engine()


@MODELS
def test_rate_0_changes_no_bit_and_a_second_run_is_equal(
    running: Any, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    dense = draw(running, workflow(model))
    assert torch.equal(draw(running, workflow(model, pruned={"rate": 0.0})), dense)
    with caplog.at_level(logging.WARNING, "atedm"):
        pruned = draw(running, workflow(model, pruned={}))
    assert not [record.message for record in caplog.records if record.name == "atedm"]
    assert not torch.equal(pruned, dense)
    assert pruned.isfinite().all()
    assert torch.equal(draw(engine.Engine(), workflow(model, pruned={})), pruned)
    assert torch.equal(draw(engine.Engine(), workflow(model)), dense)
    assert SHELF[model].model_options == {"transformer_options": {}}
    assert pruning_of(SHELF[model]) is None


def _batch_and_size(model: str) -> dict[str, Any]:
    return {"model": model, "pruned": {}, "size": (96, 160)}


@MODELS
def test_each_image_of_a_batch_is_its_own(running: Any, model: str) -> None:
    SHELF[model] = getattr(small, model)(dtype=torch.float64)
    batch = draw(running, workflow(**_batch_and_size(model), batch=2))
    alone = draw(running, workflow(**_batch_and_size(model)))
    torch.testing.assert_close(alone[0], batch[0], rtol=1e-4, atol=1e-3)
    other = draw(running, workflow(model, pruned={}))  # another size between
    assert other.shape[-2:] == (16, 16)
    assert torch.equal(draw(engine.Engine(), workflow(**_batch_and_size(model))), alone)


#: Where each block turns to the tokens of the image one by one.
ONE_BY_ONE = {
    "flux": ("double_blocks.img_mlp", "single_blocks.linear1"),
    "sd3": ("joint_blocks.x_block.mlp",),
    "qwen": ("transformer_blocks.img_mlp",),
}


@MODELS
def test_blocks_run_on_fewer_tokens(running: Any, model: str) -> None:
    network, seen = SHELF[model].model.diffusion_model, []
    for path in ONE_BY_ONE[model]:
        name, _, inside = path.partition(".")
        for block in getattr(network, name):
            block.get_submodule(inside).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    draw(running, workflow(model, steps=2, cfg=1.0))
    everything = [*seen]
    seen.clear()
    draw(running, workflow(model, pruned={"rate": 0.5}, steps=2, cfg=1.0))
    assert len(seen) == len(everything)
    half = len(seen) // 2
    assert seen[:half] == everything[:half]  # the first step is dense
    seen, everything = seen[half:], everything[half:]
    assert seen[0] == everything[0]
    dropped = [before - after for before, after in zip(everything, seen, strict=True)]
    assert set(dropped[1:]) == {32}  # of the 64 of the image


@MODELS
def test_at_edm_says_what_works(running: Any, model: str) -> None:
    said = running.run(workflow(model, pruned={"method": "AT-EDM"}))
    assert "'matched' works here" in said[-1][1]["exception_message"]


def test_a_controlnet_of_flux_leaves_it_dense_and_says_so(running: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Control(comfy.controlnet.ControlBase):
        """Adds to the tokens between blocks, as a ControlNet of FLUX does."""

        def get_control(self, x_noisy: Any, *_: Any) -> dict[str, list[Any]]:
            return {"input": [torch.ones(len(x_noisy), 64, 48)], "output": []}

    for name in ("positive", "negative"):
        SHELF[name][0][1] |= {"control": Control(), "control_apply_to_uncond": False}
    dense = draw(running, workflow("flux"))
    with caplog.at_level(logging.WARNING, "atedm"):
        assert torch.equal(draw(running, workflow("flux", pruned={})), dense)
    assert sum("ControlNet adds" in record.message for record in caplog.records) == 2


def test_cancel_in_the_middle(running: Any) -> None:
    first = draw(running, workflow("flux", pruned={}))
    times = iter(range(100))

    def cancel(*_: Any) -> None:
        if next(times) == 3:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    hook = SHELF["flux"].model.diffusion_model.single_blocks[1].register_forward_hook(cancel)
    assert running.run(workflow("flux", pruned={}, seed=4))[-1][0] == "execution_interrupted"
    hook.remove()
    assert torch.equal(draw(engine.Engine(), workflow("flux", pruned={})), first)


def test_the_stand_in_has_the_signatures_of_the_application() -> None:
    pairs = [
        (standin.DoubleStreamBlock.forward, layers.DoubleStreamBlock.forward),
        (standin.SingleStreamBlock.forward, layers.SingleStreamBlock.forward),
        (standin.Flux.forward, comfy.ldm.flux.model.Flux.forward),
    ]
    for ours, theirs in pairs:
        names = [[*inspect.signature(function).parameters] for function in (ours, theirs)]
        assert names[0] == names[1], theirs
