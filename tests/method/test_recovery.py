"""Filling the dropped positions again: copies and updates, against loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.method.gwpr import rank_by_attention
from atedm.method.keep import gather_tokens, keep_count, keep_most_important
from atedm.method.matching import attention_source, match_by_features
from atedm.method.recovery import (
    direct_copy,
    group_sizes,
    mean_by_source,
    similarity_copy,
    update_of_match,
    with_own_update,
)


def make(batch: int, tokens: int, channels: int = 3, seed: int = 0, kept: int | None = None) -> tuple[Tensor, ...]:
    """Tokens of all positions, and the indices and new values of some of them."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(batch, tokens, channels, generator=generator)
    kept = max(1, tokens * 2 // 5) if kept is None else kept
    keep = torch.rand(batch, tokens, generator=generator).argsort(-1)[:, :kept].sort(-1).values
    return before, keep, torch.randn(batch, kept, channels, generator=generator)


def random_map(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6, 15])
def test_copies_match_the_formula(tokens: int, dtype: torch.dtype) -> None:
    before, keep, kept_tokens = make(2, tokens)
    before, kept_tokens = before.to(dtype), kept_tokens.to(dtype)
    source = attention_source(random_map(2, tokens), keep)
    for out, expected in [
        (similarity_copy(kept_tokens, source), references.over_batch(references.gather_tokens, kept_tokens, source)),
        (
            direct_copy(kept_tokens, keep, before),
            references.over_batch(references.direct_copy, kept_tokens, keep, before),
        ),
    ]:
        assert out.dtype == dtype
        assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_update_is_the_difference_of_the_match_in_float32(dtype: torch.dtype) -> None:
    before, keep, kept_tokens = (x.to(dtype) if x.is_floating_point() else x for x in make(2, 15))
    source = match_by_features(before, keep).source
    start = gather_tokens(before, keep)
    update = update_of_match(kept_tokens, start, source)
    assert update.dtype == torch.promote_types(dtype, torch.float32)
    filled = (before.to(update.dtype) + update).to(dtype)
    expected = references.over_batch(references.matched_update, kept_tokens, start, before, source)
    torch.testing.assert_close(filled, expected.to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 0, atol=1e-6)
    torch.testing.assert_close(gather_tokens(filled, keep), kept_tokens, rtol=1e-6, atol=1e-6)  # not rounded twice


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 14), seed=st.integers(0, 99))
def test_groups_are_counted_and_their_means_taken(data: st.DataObject, batch: int, tokens: int, seed: int) -> None:
    kept = data.draw(st.integers(1, tokens))
    before, keep, _ = make(batch, tokens, seed=seed, kept=kept)
    source = match_by_features(before, keep).source
    sizes = group_sizes(source, kept)
    assert sizes.dtype == torch.float32
    assert sizes.tolist() == [[row.count(k) for k in range(kept)] for row in source.tolist()]
    expected = references.over_batch(references.group_means, before, source, kept)
    means = mean_by_source(before, source, sizes)
    torch.testing.assert_close(means, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert torch.equal(mean_by_source(before, source, sizes), means)


def test_large_groups_of_bfloat16_are_summed_in_float32() -> None:
    tokens = torch.ones(1, 3000, 2, dtype=torch.bfloat16)  # whose sum would stop at 256
    source = torch.zeros(1, 3000, dtype=torch.int64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        sizes = group_sizes(source, 1)
        mean = mean_by_source(tokens, source, sizes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert sizes.tolist() == [[3000.0]]
    assert torch.equal(mean, torch.ones(1, 1, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_set_the_last_update_apart_from_the_group_is_added(share: float) -> None:
    tokens, keep, kept_tokens = make(2, 11)
    source = match_by_features(tokens, keep).source
    update = update_of_match(kept_tokens, gather_tokens(tokens, keep), source)
    last = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(6))
    out = with_own_update(update, last, source, keep.shape[1], share)
    for b in range(2):
        for i in range(11):
            group = [j for j in range(11) if source[b, j] == source[b, i]]
            expected = update[b, i].double() + share * (last[b, i].double() - last[b, group].double().mean(0))
            torch.testing.assert_close(out[b, i].double(), expected, rtol=1e-5, atol=1e-5)
    groups = torch.randn(2, keep.shape[1], 3, generator=torch.Generator().manual_seed(7))
    same = gather_tokens(groups, source)  # who got what its group got has nothing of its own
    torch.testing.assert_close(with_own_update(update, same, source, keep.shape[1], share), update)


def fill(name: str, kept_tokens: Tensor, keep: Tensor, before: Tensor, a: Tensor) -> Tensor:
    if name == "similarity":
        return similarity_copy(kept_tokens, attention_source(a, keep))
    if name == "direct":
        return direct_copy(kept_tokens, keep, before)
    source = match_by_features(before, keep).source
    start = mean_by_source(before, source, group_sizes(source, keep.shape[1]))
    return before + update_of_match(kept_tokens, start, source)


FILLS = ["similarity", "direct", "matched"]


@pytest.mark.parametrize("name", FILLS)
def test_gradients(name: str) -> None:
    before, keep, kept_tokens = make(2, 12, channels=2)
    before = before.double().requires_grad_()
    kept_tokens = kept_tokens.double().requires_grad_()
    a = random_map(2, 12)
    assert torch.autograd.gradcheck(lambda x, y: fill(name, x, keep, y, a), (kept_tokens, before))
    (gradient,) = torch.autograd.grad(fill(name, kept_tokens, keep, before, a).sum(), kept_tokens)
    assert (gradient != 0).all()


def test_a_token_copied_often_gets_as_many_gradients() -> None:
    kept_tokens = torch.zeros(1, 2, 1, requires_grad=True)
    filled = similarity_copy(kept_tokens, torch.tensor([[0, 1, 0, 0, 1]]))
    (gradient,) = torch.autograd.grad(filled.sum(), kept_tokens)
    assert gradient.flatten().tolist() == [3, 2]


@pytest.mark.parametrize("name", FILLS)
def test_a_whole_block_compiles_without_graph_break_and_never_waits_for_the_device(name: str) -> None:
    def prune_and_fill(q: Tensor, k: Tensor, before: Tensor) -> Tensor:
        ranked = rank_by_attention(q, k, 0.5)
        keep = keep_most_important(ranked.importance, keep_count(before.shape[1], 0.63))
        return fill(name, 2 * gather_tokens(before, keep), keep, before, ranked.attention_map)

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 15, 4, generator=generator) for _ in range(2))
    before = torch.randn(2, 15, 6, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(prune_and_fill, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, before), prune_and_fill(q, k, before))
    # A meta tensor has no values, so whatever asks for one raises.
    assert prune_and_fill(q.to("meta"), k.to("meta"), before.to("meta")).shape == before.shape


def test_nothing_reads_the_global_generator() -> None:
    before, keep, kept_tokens = make(1, 12)
    state = torch.get_rng_state()
    for name in FILLS:
        fill(name, kept_tokens, keep, before, random_map(1, 12))
    assert torch.equal(torch.get_rng_state(), state)
