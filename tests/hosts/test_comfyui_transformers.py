"""The host for ComfyUI's transformers on a stand-in of FLUX; `tests/comfyui` has the same in the real application."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import comfyui_standin as standin
import comfyui_standin_flux as flux
from atedm.hosts.comfyui import prune, pruning_of
from atedm.hosts.comfyui_transformers import find_spans, gather_places
from atedm.method.at_edm import AtEdm
from atedm.method.matched import Matched
from comfyui_standin import Guider, ModelPatcher

SIGMAS = torch.tensor([10.0, 6.0, 3.0, 0.0])
SIZE = (12, 8)
"""24 tokens."""


def model(**changes: Any) -> ModelPatcher:
    torch.manual_seed(0)
    return ModelPatcher(standin.BaseModel(flux.Flux(**changes).eval()))


def contexts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 5, standin.WORDS, generator=generator) for _ in range(2)]


def draw(patcher: ModelPatcher, batch: int = 1, noise: Tensor | None = None, **options: Any) -> Tensor:
    noise = torch.randn(batch, 4, *SIZE, generator=torch.Generator().manual_seed(2)) if noise is None else noise
    return Guider(patcher, contexts(), **options).sample(noise, SIGMAS)


def test_spans_leave_the_first_block() -> None:
    places = [span.place for span in find_spans(model().model.diffusion_model)]
    assert [(place.name, place.layers, place.index) for place in places] == [
        ("double_blocks.1-2", 2, 0),
        ("single_blocks.0-3", 4, 1),
    ]


def test_blocks_run_on_what_is_kept_and_all_words() -> None:
    patcher = model()
    pruned = draw(prune(patcher, Matched(0.5)))
    network = patcher.model.diffusion_model
    assert [block.seen[0] for block in network.double_blocks] == [(5, 24), (5, 12), (5, 12)]
    assert [block.seen[0] for block in network.single_blocks] == [17, 17, 17, 17]
    assert pruned.isfinite().all()
    assert not torch.equal(pruned, draw(patcher))


def test_rate_0_changes_no_bit_and_equal_runs_are_equal() -> None:
    patcher = model()
    dense = draw(patcher)
    assert torch.equal(draw(prune(patcher, Matched(0.0))), dense)
    clone = prune(patcher, Matched(0.5))
    first = draw(clone)
    draw(clone, batch=2)
    assert torch.equal(draw(clone), first)
    assert torch.equal(draw(clone.clone()), first)  # which copies what is laid on it
    assert torch.equal(draw(patcher), dense)


def test_a_dense_first_step_leaves_each_token_its_own_update() -> None:
    """The second step then adds to the update of a group what set that of a token apart, as in diffusers."""
    patcher = model()
    method = Matched(0.5, level_factors=(), dense_share=0.01)
    remembered = draw(prune(patcher, method))
    seen = [count for _, count in patcher.model.diffusion_model.double_blocks[1].seen[-3:]]
    assert seen == [24, 12, 12]
    forgetful = draw(prune(patcher, replace(method, own_update_share=0.0)))
    pruned_at_once = draw(prune(patcher, replace(method, dense_share=0.0)))
    dense = draw(patcher)
    off = [float((image - dense).square().mean()) for image in (remembered, forgetful, pruned_at_once)]
    assert off[0] < off[1]
    assert off[0] < off[2]
    assert torch.equal(draw(prune(patcher, method)), remembered)
    torch.testing.assert_close(draw(prune(patcher, method), together=False), remembered)


def test_pruning_of_copies_is_dense() -> None:
    """Tokens that are equal to others, in rotary place too, are stood for exactly by those that are kept."""
    patcher = model(turn=0.0)
    noise = torch.randn(1, 4, 2, 4).repeat(1, 1, 6, 2)  # two tokens, over and over
    found = draw(prune(patcher, Matched(0.75)), noise=noise)
    assert patcher.model.diffusion_model.single_blocks[1].seen[-1] == 5 + 6
    torch.testing.assert_close(found, draw(patcher, noise=noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("single", [True, False], ids=["FLUX", "Qwen"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kept_token_keeps_its_place(single: bool, batch: int) -> None:
    rotary = torch.randn(batch, 5 + 24, 3, 2, 2)
    keep = torch.stack([torch.randperm(24)[:7].sort().values for _ in range(3)])
    dim = 1 if single else 2
    found = gather_places(rotary.unsqueeze(dim), keep, 5).squeeze(dim)
    for image in range(3):
        of = rotary[min(image, batch - 1)]
        assert torch.equal(found[image], torch.stack([*of[:5], *(of[5 + int(token)] for token in keep[image])]))


def test_conditions_together_or_apart_and_images_of_a_batch() -> None:
    together, apart = (draw(prune(model(), Matched(0.5)), batch=2, together=together) for together in (True, False))
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)
    noise = torch.randn(2, 4, *SIZE)
    clone = prune(model(), Matched(0.5))
    alone = torch.cat([draw(clone, noise=one) for one in noise.split(1)])
    torch.testing.assert_close(draw(clone, noise=noise), alone, rtol=1e-3, atol=1e-3)


def test_while_a_controlnet_adds_to_its_tokens_it_is_dense(caplog: pytest.LogCaptureFixture) -> None:
    patcher = model()
    added = {"input": [torch.randn(1, 24, flux.WIDTH)]}
    found = []
    for used in (patcher, prune(patcher, Matched(0.5))):
        guider = Guider(used, contexts())
        guider.control = added
        with caplog.at_level(logging.WARNING):
            found.append(guider.sample(torch.ones(1, 4, *SIZE), SIGMAS))
    assert torch.equal(*found)
    lines = [record.message for record in caplog.records]
    assert lines == [
        f"Token pruning: {name} is left dense, because a ControlNet adds to its tokens between blocks"
        for name in ("double_blocks.1-2", "single_blocks.0-3")
    ]


@pytest.mark.parametrize("before", [True, False])
def test_blocks_that_another_node_replaces_are_dense(before: bool, caplog: pytest.LogCaptureFixture) -> None:
    patcher = model()
    dense = draw(patcher)

    def replaced(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"](args)

    other = patcher.clone()
    if before:
        other.set_model_patch_replace(replaced, "dit", "double_block", 2)
    clone = prune(other, Matched(0.5))
    if not before:
        clone.set_model_patch_replace(replaced, "dit", "double_block", 2)
    with caplog.at_level(logging.WARNING):
        draw(clone)
    network = patcher.model.diffusion_model
    assert network.double_blocks[1].seen[-1] == (5, 24)
    assert network.single_blocks[1].seen[-1] == 17
    assert [record.message for record in caplog.records] == [
        "Token pruning: double_blocks.1-2 is left dense, because another node replaces some of its blocks"
    ]
    assert torch.equal(draw(patcher), dense)


def test_where_attention_cannot_be_weighted_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As SD3 in old releases, whose blocks are handed neither a mask nor options."""
    run = flux._run

    def plain(block: Any, replaced: Any, args: dict[str, Any]) -> Any:
        def few(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            known = {name: args[name] for name in args if name not in ("attn_mask", "transformer_options")}
            return replaced(known, {"original_block": lambda given: extra["original_block"](args | given)})

        return run(block, replaced and few, args)

    monkeypatch.setattr(flux, "_run", plain)
    patcher = model()
    with caplog.at_level(logging.WARNING):
        assert draw(prune(patcher, Matched(0.5))).isfinite().all()
    assert patcher.model.diffusion_model.single_blocks[1].seen[-1] == 17
    assert len(caplog.records) == 1
    assert "cannot weight tokens" in caplog.records[0].message


def test_methods_that_read_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="'matched' works here"):
        prune(model(), AtEdm())


def test_what_was_kept_is_recorded() -> None:
    clone = prune(model(), Matched(0.5))
    draw(clone, batch=2)
    record = pruning_of(clone).record  # type: ignore[union-attr]
    assert {name: span.share(1).shape for name, span in record.spans.items()} == {
        "double_blocks.1-2": (2, 6, 4),
        "single_blocks.0-3": (2, 6, 4),
    }
