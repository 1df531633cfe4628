"""Methods inside the U-Net: every setting does what it should, and the whole agrees with a slow reference."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import atedm
import references
from atedm import AtEdm, Early, Matched, Place, not_second_level, only_second_level
from atedm.hosts.diffusers_unet import PrunedTransformer2DModel
from atedm.method.contract import Method
from atedm.method.cover import lattice, representative
from atedm.method.keep import gather_tokens, keep_count, keep_most_important
from atedm.method.matching import match_by_features
from atedm.method.schedule import PAIRINGS
from models import EARLY, LATE, TEXT_WIDTH, distance, importance, inputs, run, sdxl_unet, small_unet, watched


def output(unet: Any, method: Method, timestep: Any = LATE, **changes: Any) -> Tensor:
    with atedm.pruned(unet, method):
        return run(unet, timestep, **changes)


# --- against a reference ----------------------------------------------------------------------------------------------


def reference_block(block: Any, x: Tensor, text: Tensor, method: AtEdm) -> Tensor:
    """One attention block with its layers from diffusers, and all that is pruning from the slow references."""
    batch, channels, height, width = x.shape
    tokens = block.proj_in(block.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels))
    first, *others = block.transformer_blocks
    normed = first.norm1(tokens)
    q, k = (
        project(normed).unflatten(-1, (first.attn1.heads, -1)).transpose(1, 2).double().tolist()
        for project in (first.attn1.to_q, first.attn1.to_k)
    )
    scale = (channels // first.attn1.heads) ** -0.5
    tokens = first(tokens, encoder_hidden_states=text)
    count = keep_count(tokens.shape[1], method.rate)
    kept, sources = [], []
    for heads_q, heads_k in zip(q, k, strict=True):
        ranked = references.importance(heads_q, heads_k, scale, "self-attention", "rms", method.iterations)
        kept.append(references.keep_most_important(ranked, count))
        sources.append(references.attention_source(references.mean_attention_map(heads_q, heads_k, scale), kept[-1]))
    tokens = torch.stack([tokens[b, keep] for b, keep in enumerate(kept)])
    for layer in others:
        tokens = layer(tokens, encoder_hidden_states=text)
    tokens = torch.stack([tokens[b, source] for b, source in enumerate(sources)])
    return block.proj_out(tokens).reshape(batch, height, width, channels).permute(0, 3, 1, 2) + x


@pytest.mark.parametrize("method", [AtEdm(), AtEdm(0.4, iterations=7)], ids=["paper", "seven iterations"])
def test_a_block_agrees_with_the_slow_reference(method: AtEdm) -> None:
    unet = sdxl_unet().double()
    atedm.apply(unet, method)
    block = unet.get_submodule("mid_block.attentions.0")
    assert isinstance(block, PrunedTransformer2DModel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 4, 5, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        actual = block(x, encoder_hidden_states=text).sample
        torch.testing.assert_close(actual, reference_block(block, x, text, method), rtol=1e-7, atol=1e-7)
        (as_tuple,) = block(x, encoder_hidden_states=text, return_dict=False)
        assert torch.equal(as_tuple, actual)
        assert not torch.allclose(actual, reference_block(block, x, text, AtEdm(0.0)), atol=0.1)


# --- matched pruning --------------------------------------------------------------------------------------------------


def block_and_text(batch: int = 2) -> tuple[Any, Tensor]:
    unet = sdxl_unet().double()
    block = unet.get_submodule("mid_block.attentions.0")
    return (unet, block), torch.randn(
        batch, 7, TEXT_WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def test_nothing_is_lost_where_dropped_tokens_are_copies_of_kept_ones() -> None:
    # Attention that counts a kept token as often as it has copies is what attention to the copies themselves would be.
    (unet, block), text = block_and_text()
    values = torch.randn(2, 48, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = values[:, :, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2] * 3 + [0, 1, 1, 2, 2, 2, 0, 0])].reshape(2, 48, 4, 8)
    with torch.no_grad():
        dense = block(x, encoder_hidden_states=text).sample
        with atedm.pruned(unet, Matched(0.6)):
            torch.testing.assert_close(block(x, encoder_hidden_states=text).sample, dense, rtol=0.0, atol=1e-5)
        with atedm.pruned(unet, AtEdm(0.6)):
            assert distance(block(x, encoder_hidden_states=text).sample, dense) > 1e-3


def test_the_parts_of_matched_pruning_are_put_together_so() -> None:
    (unet, block), text = block_and_text()
    x = torch.randn(2, 48, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method = Matched(0.5)
    with torch.no_grad():
        tokens = block.proj_in(block.norm(x).flatten(2).mT)
        order = representative(tokens, lattice((4, 5)), 10, method.cover_share)
        keep = keep_most_important(order, 10)
        source = match_by_features(tokens, keep).source
        count = torch.nn.functional.one_hot(source, 10).sum(1).double()
        start = torch.nn.functional.one_hot(source, 10).double().mT @ tokens / count.unsqueeze(-1)
        kept = start
        for layer in block.transformer_blocks:
            kept = layer(kept, attention_mask=count.log().unsqueeze(1), encoder_hidden_states=text)
        filled = tokens + gather_tokens(kept - start, source)
        expected = x + block.proj_out(filled).mT.reshape(x.shape)
        with atedm.pruned(unet, method):
            torch.testing.assert_close(block(x, encoder_hidden_states=text).sample, expected, rtol=1e-5, atol=1e-5)


# --- every setting ----------------------------------------------------------------------------------------------------


def rank_by_words(view: atedm.View) -> Tensor:
    q, k, scale = view.cross_attention()
    return torch.softmax(scale * q.float() @ k.float().mT, -1).square().sum(-1).mean(1)


def refill_with_zeros(to_refill: atedm.ToRefill) -> Tensor:
    zeros = torch.zeros_like(to_refill.before)
    return zeros.scatter(1, to_refill.keep.unsqueeze(-1).expand_as(to_refill.kept), to_refill.kept)


@pytest.mark.parametrize(
    "methods",
    [
        [AtEdm(rate) for rate in (0.1, 0.3, 0.63, 0.95)],
        [AtEdm(), AtEdm(where=not_second_level), AtEdm(where=only_second_level)],
        [AtEdm(), AtEdm(rank=rank_by_words), AtEdm(refill=refill_with_zeros)],
        [AtEdm(iterations=iterations) for iterations in (1, 2, 3)],
        [Matched(rate) for rate in (0.1, 0.3, 0.7, 0.95)],
        [Matched(), Matched(where=not_second_level), Matched(where=only_second_level)],
        [Matched(level_factors=factors) for factors in ((), ((2, 0.5),), ((2, 0.5), (3, 0.5)))],
        [Matched(cover_share=share) for share in (0.0, 0.4, 1.0)],
    ],
    ids=["rate", "where", "own functions", "iterations", "rate (m)", "where (m)", "level factors", "cover share"],
)
def test_each_setting_makes_another_image(methods: list[Method]) -> None:
    unet = sdxl_unet()
    outputs = [run(unet), *(output(unet, method) for method in methods)]
    assert all(torch.isfinite(one).all() for one in outputs)
    assert min(distance(one, other) for one, other in combinations(outputs, 2)) > 0.01


def test_large_maps_are_sampled_and_small_ones_made_whole() -> None:
    unet = small_unet()
    outputs = {
        size: [output(unet, AtEdm(sample=sample), size=size) for sample in (256, 16, None)]
        for size in ((16, 16), (80, 64))
    }
    assert all(torch.equal(one, outputs[16, 16][0]) for one in outputs[16, 16])
    assert min(distance(one, other) for one, other in combinations(outputs[80, 64], 2)) > 0.01


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_pairing_spares_its_blocks_in_early_steps_only(pairing: str) -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, AtEdm(spare=Early(pairing=pairing)))
    down, up = {"F": 0, "L": 1}[pairing[0]], {"F": 0, "M": 1, "L": 2}[pairing[2]]
    spared = {f"down_blocks.{stage}.attentions.{down}" for stage in (1, 2)}
    spared |= {f"up_blocks.{stage}.attentions.{up}" for stage in (0, 1)}
    with watched(unet) as calls:
        run(unet, EARLY)
        run(unet, LATE)
    assert summary.spared == spared
    assert calls[0].kept.keys() == summary.pruned - spared
    assert calls[1].kept.keys() == summary.pruned


class SpareTheMiddle:
    """A schedule of one's own: the middle of the run spares the second level."""

    def is_early(self, share: float) -> bool:
        return 1 / 3 <= share < 2 / 3

    def spares(self, place: Place) -> bool:
        return place.level == 2


def test_a_schedule_of_one_s_own_says_when_and_what_to_spare() -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, AtEdm(spare=SpareTheMiddle()))  # type: ignore[arg-type]
    with watched(unet) as calls:
        for timestep in torch.linspace(999, 0, 6):
            run(unet, timestep)
    assert [call.is_early(summary) for call in calls] == [False, False, True, True, False, False]


@pytest.mark.parametrize("method", [AtEdm(spare=None), Matched()], ids=lambda method: method.name)
def test_without_a_schedule_every_step_prunes_alike(method: Method) -> None:
    unet = sdxl_unet()
    atedm.apply(unet, method)
    with watched(unet) as calls:
        for timestep in torch.linspace(999, 0, 3):
            run(unet, timestep)
    assert calls[0].kept == calls[1].kept == calls[2].kept


@pytest.mark.parametrize(
    "method",
    [AtEdm(), Matched(), AtEdm(rank=rank_by_words), AtEdm(refill=refill_with_zeros)],
    ids=["paper", "matched", "own rank", "own refill"],
)
def test_nothing_waits_for_the_device(method: Method) -> None:
    """Tensors without values run through, so no value is ever read."""
    unet = small_unet().to("meta")
    call = inputs(unet)
    call = {key: value.to("meta") for key, value in call.items() if isinstance(value, Tensor)} | {
        "added_cond_kwargs": {key: value.to("meta") for key, value in call["added_cond_kwargs"].items()}
    }
    summary = atedm.apply(unet, method)
    with watched(unet) as calls:
        for timestep in torch.linspace(999, 0, 2, device="meta"):
            assert run(unet, timestep, **call).shape == (2, 4, 16, 16)
    assert [call.step for call in calls] == [0, 1]
    assert [call.is_early(summary) for call in calls] == [bool(summary.spared), False]


def test_both_halves_of_a_guided_batch_are_pruned_each_on_its_own() -> None:
    unet = sdxl_unet()
    atedm.apply(unet, "paper")
    seen: list[atedm.Observation] = []
    with atedm.observed(unet, seen.append):
        run(unet, batch=4)
    assert not any(torch.equal(one.keep[:2], one.keep[2:]) for one in seen)


def test_self_attention_ranks_before_the_words_have_come_in() -> None:
    unet = small_unet()
    words = torch.randn(2, 7, TEXT_WIDTH, generator=torch.Generator().manual_seed(9))
    first = "down_blocks.1.attentions.0"
    for method, by_words in ((AtEdm(), False), (AtEdm(rank=rank_by_words), True), (Matched(), False)):
        with atedm.pruned(unet, method):
            same = torch.equal(importance(unet)[first], importance(unet, encoder_hidden_states=words)[first])
        assert same != by_words
