"""The host for ComfyUI on a stand-in of its patch points; `tests/comfyui` has the same in the real application."""

import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comfyui_standin as standin
from atedm.hosts.comfyui import prune, pruning_of
from atedm.hosts.comfyui_unet import find_spans
from atedm.method.at_edm import AtEdm
from atedm.method.early_strength import EarlyStrength
from atedm.method.matched import Matched
from comfyui_standin import BasicTransformerBlock, Guider, ModelPatcher

SIGMAS = torch.tensor([10.0, 6.0, 3.0, 1.0, 0.0])
METHODS = pytest.mark.parametrize("method", [Matched(0.6), AtEdm(spare=None)], ids=["matched", "AT-EDM"])


def model(depth: int = 3) -> ModelPatcher:
    torch.manual_seed(0)
    network = standin.UNetModel(depth)
    for name, parameter in network.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):  # sharp attention, so that what is dropped shows
            nn.init.normal_(parameter, std=2.5 * parameter.shape[1] ** -0.5)
    return ModelPatcher(standin.BaseModel(network.eval()))


def contexts(number: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 5, standin.WORDS, generator=generator) for _ in range(number)]


def draw(patcher: ModelPatcher, size: tuple[int, int] = (16, 12), batch: int = 1, **options: Any) -> Tensor:
    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(2))
    return Guider(patcher, contexts(), **options).sample(noise, SIGMAS)


def layers(patcher: ModelPatcher) -> list[BasicTransformerBlock]:
    return [module for module in patcher.model.modules() if isinstance(module, BasicTransformerBlock)]


def test_it_needs_no_diffusers() -> None:
    code = """
import sys
sys.modules["diffusers"] = sys.modules["transformers"] = sys.modules["accelerate"] = None
import atedm.hosts.comfyui, atedm.hosts.comfyui_unet, atedm.method.presets, atedm.method.early_strength, atedm.words
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_spans_have_their_places() -> None:
    places = [span.place for span in find_spans(model().model.diffusion_model, 0)]
    found = [(place.stage, place.level, place.index, place.count, place.layers, place.name) for place in places]
    assert found == [
        ("down", 2, 0, 1, 3, "input_blocks.3.1"),
        ("mid", 2, 0, 1, 3, "middle_block.1"),
        ("up", 2, 0, 2, 3, "output_blocks.0.1"),
        ("up", 2, 1, 2, 3, "output_blocks.1.1"),
    ]


@METHODS
def test_layers_run_on_what_is_kept(method: Any) -> None:
    patcher = model()
    pruned = draw(prune(patcher, method))
    kept = method.count(next(find_spans(patcher.model.diffusion_model, 0)).place, 48)
    assert kept < 48
    for number, layer in enumerate(layers(patcher)):
        assert layer.seen == [48 if number % 3 < method.dense_layers else kept] * 4
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, draw(patcher))


@METHODS
def test_rate_0_changes_no_bit_and_equal_runs_are_equal(method: Any) -> None:
    patcher = model()
    dense = draw(patcher)
    assert torch.equal(draw(prune(patcher, replace(method, rate=0.0))), dense)
    clone = prune(patcher, method)
    first = draw(clone)
    draw(clone, (24, 16), batch=2)  # another image between
    assert torch.equal(draw(clone), first)
    assert torch.equal(draw(clone.clone()), first)
    assert torch.equal(draw(patcher), dense)


def test_pruning_of_copies_is_dense() -> None:
    """Of tokens that are all equal to one of a few, those that are kept stand for the others exactly."""
    patcher = model()
    span = next(find_spans(patcher.model.diffusion_model, 0)).module
    x = torch.randn(2, standin.CHANNELS, 1, 2).repeat(1, 1, 6, 4)
    span.norm = nn.Identity()
    context = contexts(1)[0].expand(2, -1, -1)
    guider = Guider(prune(patcher, Matched(0.75, level_factors=())), contexts(1))
    found = []

    def call(*_: Any) -> Tensor:
        with torch.no_grad():
            found.append(span(x, context, options))
        return torch.zeros(())

    for lay in (False, True):
        options: dict[str, Any] = {"wrappers": guider.model_patcher.wrappers if lay else {}, "sigmas": torch.ones(1)}
        options |= {"cond_or_uncond": [0], "block": ("input", 3)}
        guider.model_patcher.patch_model()
        wrappers = standin.all_wrappers("apply_model", options)
        standin.WrapperExecutor(call, None, wrappers)(x, None, None, None, None, options)
        guider.model_patcher.unpatch_model()
    assert span.transformer_blocks[0].seen == [48, 12]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@METHODS
def test_conditions_may_come_together_or_apart(method: Any) -> None:
    together, apart = (draw(prune(model(), method), batch=2, together=together) for together in (True, False))
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)
    if method.remembers:
        without = draw(prune(model(), replace(method, own_update_share=0.0)), batch=2)
        assert (together - without).abs().max() > 0.01


def test_each_image_of_a_batch_is_pruned_on_its_own() -> None:
    clone = prune(model(), Matched(0.6))
    noise = torch.randn(2, 4, 16, 12)
    both = Guider(clone, contexts()).sample(noise, SIGMAS)
    alone = torch.cat([Guider(clone, contexts()).sample(one, SIGMAS) for one in noise.split(1)])
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


def test_the_model_and_other_clones_of_it_stay_as_they_are() -> None:
    patcher = model()
    before = {name: dict(vars(module)) for name, module in patcher.model.named_modules()}
    draw(prune(patcher, Matched()))
    assert patcher.object_patches == {}
    assert patcher.wrappers == {}
    assert pruning_of(patcher) is None
    for name, module in patcher.model.named_modules():
        after = {key: value for key, value in vars(module).items() if key != "forward"}
        assert after == before[name]
        # ComfyUI puts back what it found, on the instance: the class's own method, bound.
        forward = vars(module).get("forward", module.forward)
        assert forward.__func__ is type(module).forward


@METHODS
def test_an_exception_in_the_middle_leaves_nothing(method: Any) -> None:
    patcher = model()
    clone = prune(patcher, method)
    first = draw(clone)
    guider = Guider(clone, contexts())
    times = iter((False, True))

    def fail(*_: Any) -> None:
        if next(times):
            raise KeyboardInterrupt

    hook = layers(patcher)[4].ff.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        guider.sample(torch.randn(1, 4, 16, 12), SIGMAS)
    hook.remove()
    assert not any(key.startswith("atedm") for key in guider.model_options["transformer_options"])
    for span in pruning_of(clone).spans:  # type: ignore[union-attr]
        assert span.call is None  # type: ignore[attr-defined]
        assert span.active is None  # type: ignore[attr-defined]
    assert torch.equal(draw(clone), first)


def _patch(name: str, patcher: ModelPatcher) -> None:
    patcher.model_options["transformer_options"]["patches"] = {name: [lambda *args: args]}


def _lay_over(patcher: ModelPatcher) -> None:
    path = "diffusion_model.input_blocks.3.1.transformer_blocks.0.forward"
    inner = patcher.get_model_object(path)
    patcher.add_object_patch(path, lambda *args, **kwargs: inner(*args, **kwargs))


OTHERS = {
    "attn1 patched": partial(_patch, "attn1_patch"),
    "middle patched": partial(_patch, "middle_patch"),
    "attn2 replaced": lambda patcher: patcher.set_model_patch_replace(lambda *_: None, "attn2", "input", 3),
    "forward laid over": _lay_over,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_block_that_another_node_patches_is_left_dense(other: Any, caplog: pytest.LogCaptureFixture) -> None:
    patcher = model()
    clone = prune(patcher, Matched())
    other(clone)
    with caplog.at_level(logging.WARNING):
        draw(clone)
    assert set(layers(patcher)[0].seen) == {48}
    lines = [record.message for record in caplog.records if "input_blocks.3.1 is left dense" in record.message]
    assert len(lines) == 1  # once a run, not once a step


def test_early_steps_prune_as_much_as_is_asked_for() -> None:
    patcher = model()
    draw(prune(patcher, EarlyStrength(Matched(0.5, level_factors=()), strength=0.5)))
    assert layers(patcher)[0].seen == [36, 36, 24, 24]  # 0 and 1/4 of the run are before 0.3
    with pytest.raises(ValueError, match="strength"):
        EarlyStrength(Matched(), strength=1.5)


def test_image_to_image_starts_where_it_starts() -> None:
    patcher = model()
    noise = torch.randn(1, 4, 16, 12)
    Guider(prune(patcher, EarlyStrength(Matched(0.5, level_factors=()), 0.0)), contexts()).sample(noise, SIGMAS[1:])
    assert layers(patcher)[0].seen == [24, 24, 24]  # its first sigma, 6 of 10, is past the first 0.3


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(ValueError, match="pruned already"):
        prune(prune(model(), Matched()), Matched())
    with pytest.raises(ValueError, match="'matched' works here"):
        prune(model(depth=1), AtEdm())
    assert draw(prune(model(depth=1), Matched())).isfinite().all()
    with pytest.raises(ValueError, match="found a Linear"):
        prune(ModelPatcher(standin.BaseModel(nn.Linear(1, 1))), Matched())
    strange = model()
    strange.model.diffusion_model.num_res_blocks = (2, 1)
    with pytest.raises(ValueError, match="kind not known here"):
        prune(strange, Matched())


def test_what_was_kept_is_recorded_for_the_images_that_were_asked_for() -> None:
    clone = prune(model(), Matched(0.5, level_factors=()))
    draw(clone, batch=3)
    record = pruning_of(clone).record  # type: ignore[union-attr]
    assert [*record.spans] == ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
    span = record.spans["middle_block.1"]
    assert span.share().shape == (3, 8, 6)
    assert torch.equal(span.share(2).sum((1, 2)), torch.tensor([24.0] * 3))
    with pytest.raises(ValueError, match="step 7; it was in 0, 1, 2, 3"):
        span.share(7)
