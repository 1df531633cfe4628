"""Matched pruning on a view made by hand: cover, match, merge and refill against loops in float64, and its memory."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.method.contract import Memory, View
from atedm.method.cover import lattice, representative
from atedm.method.keep import gather_tokens, keep_count, keep_most_important
from atedm.method.matched import FIRST_STEP, Matched
from atedm.method.matching import match_by_features
from atedm.method.places import not_second_level
from views import SDXL, after_layers, never, view_of

LARGE = (33, 32)  # more than 1,024 tokens


def matched_view(*arguments: Any, **options: Any) -> View:
    """No attention is made."""
    return dataclasses.replace(view_of(*arguments, **options), self_attention=never, cross_attention=never)


# --- the algorithm ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    cover_share=st.sampled_from([0.0, 0.4, 1.0]),
    step=st.integers(0, 60),
    seed=st.integers(0, 999),
)
def test_it_covers_represents_merges_and_refills_as_it_says(
    data: st.DataObject, size: tuple[int, int], cover_share: float, step: int, seed: int
) -> None:
    number = size[0] * size[1]
    view = matched_view(size, data.draw(st.integers(1, number)), step=step, seed=seed)
    cut = Matched(cover_share=cover_share).drop(view)
    covering = lattice(size, step=step).tolist()
    for image, keep in zip(view.tokens.double(), cut.keep.tolist(), strict=True):
        base = references.keep_most_important(covering, max(1, round(cover_share * view.count)))
        apart = torch.cdist(image, image[base]).amin(1).tolist()
        others = sorted(set(range(number)) - set(base), key=lambda i: -apart[i])
        assert keep == sorted(base + others[: view.count - len(base)])
    source = references.over_batch(references.nearest_source, view.tokens, cut.keep)
    sizes = [[row.count(k) for k in range(view.count)] for row in source.tolist()]
    assert cut.weights is not None
    assert cut.weights.dtype == torch.float32
    assert cut.weights.tolist() == sizes
    means = references.over_batch(references.group_means, view.tokens, source, view.count)
    torch.testing.assert_close(cut.tokens, means, check_dtype=False, rtol=1e-5, atol=1e-6)
    kept = after_layers(cut.tokens)
    expected = references.over_batch(references.matched_update, kept, cut.tokens, view.tokens, source)
    torch.testing.assert_close(cut.refill(kept), expected, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), LARGE])
def test_tokens_keep_their_dtype_and_two_runs_are_equal(size: tuple[int, int], dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    first, second = (Matched().drop(matched_view(size, dtype=dtype)) for _ in range(2))
    kept = after_layers(first.tokens)
    assert first.tokens.dtype == first.refill(kept).dtype == dtype
    assert first.importance.dtype == torch.float32 or dtype == torch.float64
    assert first.weights is not None
    assert second.weights is not None
    assert first.weights.sum(-1).tolist() == [size[0] * size[1]] * 2
    for one, other in zip((*first[:3], first.weights), (*second[:3], second.weights), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.refill(kept), second.refill(kept))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_that_does_nothing_leaves_every_token_as_it_was() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        view = matched_view((6, 7), dtype=dtype)
        cut = Matched().drop(view)
        assert torch.equal(cut.refill(cut.tokens), view.tokens)


def test_it_moves_with_the_step_which_may_be_a_tensor() -> None:
    cuts = [Matched().drop(matched_view((6, 7), step=step)) for step in (4, torch.tensor(4), 5)]
    assert torch.equal(cuts[0].keep, cuts[1].keep)
    assert not torch.equal(cuts[0].keep, cuts[2].keep)


def test_of_equal_tokens_the_first_of_the_cover_stands_for_all() -> None:
    view = dataclasses.replace(matched_view((3, 4), 4), tokens=torch.ones(2, 12, 8))
    cut = Matched().drop(view)
    base = keep_most_important(lattice((3, 4), step=view.step)[None], 2)[0].tolist()
    rest = [i for i in range(12) if i not in base][:2]
    assert cut.keep.tolist() == [sorted(base + rest)] * 2
    assert cut.weights is not None
    assert cut.weights.tolist() == [[9.0, 1.0, 1.0, 1.0]] * 2
    assert torch.equal(cut.tokens, torch.ones(2, 4, 8))


@pytest.mark.parametrize("count", [1, 23, 24])
def test_one_token_and_all_but_one_and_all(count: int) -> None:
    view = matched_view((4, 6), count)
    cut = Matched().drop(view)
    if count == 1:
        torch.testing.assert_close(cut.tokens, view.tokens.mean(1, keepdim=True))
    if count == 24:
        assert torch.equal(cut.tokens, view.tokens)
        kept = after_layers(cut.tokens)
        torch.testing.assert_close(cut.refill(kept), kept)


def test_gradients_go_through_the_means_and_not_through_the_choice() -> None:
    view = matched_view((3, 4), 5)
    tokens = view.tokens.requires_grad_()
    cut = Matched().drop(view)
    assert not cut.importance.requires_grad
    (gradient,) = torch.autograd.grad(cut.refill(2 * cut.tokens).sum(), tokens)
    # Twice the mean less the mean is one mean for each of a group: together as much as there is of it.
    torch.testing.assert_close(gradient, 2 * torch.ones_like(gradient))


def test_it_compiles_without_graph_break_and_never_waits_for_the_device() -> None:
    view, method = matched_view((5, 6)), Matched()

    def prune(tokens: Tensor, step: Tensor, protected: Tensor) -> Tensor:
        cut = method.drop(View(view.place, view.size, view.count, step, tokens, never, never, protected))
        return cut.refill(2 * cut.tokens)

    arguments = (view.tokens, torch.tensor(4), (torch.arange(30) % 9 == 0).float())
    torch._dynamo.reset()
    compiled = torch.compile(prune, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), prune(*arguments))
    # A meta tensor has no values, so whatever asks for one raises.
    assert prune(*(x.to("meta") for x in arguments)).shape == view.tokens.shape


def test_protected_tokens_are_kept_and_the_others_rank_as_before() -> None:
    protected = torch.zeros(24)
    protected[[1, 8, 23]] = 1
    free, cut = (Matched().drop(matched_view(protected=mask)) for mask in (None, protected))
    for keep in cut.keep.tolist():
        assert {1, 8, 23} <= set(keep)
    others = protected == 0
    assert torch.equal(cut.importance[:, others], free.importance[:, others])
    cover = lattice((4, 6), step=3)
    assert torch.equal(free.importance, representative(matched_view().tokens, cover, 8, 0.4))


# --- memory -----------------------------------------------------------------------------------------------------------


def step_of(method: Matched, memory: Memory, number: int, *, follows: bool = True, count: int = 8) -> Tensor:
    """One step of a run: give the update of every token."""
    memory.begin_step(follows=follows)
    view = matched_view(count=count, step=number, seed=number, memory=memory)
    cut = method.drop(view)
    return cut.refill(after_layers(cut.tokens, number)) - view.tokens


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_what_set_the_last_update_apart_from_its_group_is_added(share: float) -> None:
    method, memory = Matched(own_update_share=share), Memory()
    assert method.remembers
    last = step_of(method, memory, 0)
    plain = step_of(Matched(own_update_share=0.0), Memory(), 1)
    update = step_of(method, memory, 1)
    view = matched_view(step=1, seed=1)
    source = match_by_features(view.tokens, method.drop(view).keep).source
    means = references.over_batch(references.group_means, last, source, 8)
    own = last.double() - gather_tokens(means, source)
    torch.testing.assert_close(update, plain.double() + share * own, check_dtype=False, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory.last, update, rtol=1e-4, atol=1e-5)


def test_only_the_very_last_step_of_the_same_run_is_remembered() -> None:
    method = Matched()
    plain = step_of(Matched(own_update_share=0.0), Memory(), 5)
    first = Memory()
    assert torch.equal(step_of(method, first, 5), plain)  # a first step has nothing to add
    memory = Memory()
    step_of(method, memory, 4)
    assert not torch.equal(step_of(method, memory, 5), plain)
    memory = Memory()
    step_of(method, memory, 4)
    assert torch.equal(step_of(method, memory, 5, follows=False), plain)  # another run
    memory = Memory()
    step_of(method, memory, 3)
    memory.begin_step(follows=True)  # a step in which the span did not prune
    assert torch.equal(step_of(method, memory, 5), plain)


def test_an_update_of_another_shape_is_not_added() -> None:
    plain = step_of(Matched(own_update_share=0.0), Memory(), 5)
    memory = Memory()
    memory.store(torch.randn(1, 24, 8))  # the batch was another
    assert torch.equal(step_of(Matched(), memory, 5), plain)
    assert memory.last.shape == (2, 24, 8)


def test_it_remembers_across_another_number_of_kept_tokens() -> None:
    memory = Memory()
    step_of(Matched(), memory, 4, count=5)
    plain = step_of(Matched(own_update_share=0.0), Memory(), 5)
    assert not torch.equal(step_of(Matched(), memory, 5), plain)


def test_without_a_share_nothing_is_stored() -> None:
    memory, method = Memory(), Matched(own_update_share=0.0)
    step_of(method, memory, 0)
    assert memory == Memory()
    assert not method.remembers


def test_what_is_stored_has_the_dtype_of_the_model_and_no_gradient() -> None:
    memory = Memory()
    view = matched_view(dtype=torch.bfloat16, memory=memory)
    view.tokens.requires_grad_()
    cut = Matched().drop(view)
    cut.refill(2 * cut.tokens)
    assert memory.is_new
    assert memory.last.dtype == torch.bfloat16
    assert not memory.last.requires_grad


# --- how many, where and when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
def test_every_step_prunes_alike_and_the_second_level_less(early: bool) -> None:
    for place in SDXL:
        left = Matched().count(place, 1000, early=early)
        assert left == (1000 - 560 if place.level == 2 else 300)
    assert not any(Matched().is_early(i / 50) for i in range(50))


@pytest.mark.parametrize(("share", "dense"), [(0.3, 15), (0.5, 25), (1.0, 50), (0.01, 1), (FIRST_STEP, 1), (0.0, 0)])
def test_a_run_may_begin_dense(share: float, dense: int) -> None:
    method = Matched(dense_share=share)
    early = [method.is_early(i / 50) for i in range(50)]
    assert early == [True] * dense + [False] * (50 - dense)
    assert method.count(SDXL[2], 1000, early=True) == (1000 if share else 300)
    assert method.count(SDXL[2], 1000) == 300


@given(tokens=st.integers(1, 20000), permille=st.integers(0, 999), percent=st.integers(0, 100))
def test_factors_of_levels_multiply_the_rate(tokens: int, permille: int, percent: int) -> None:
    method = Matched(rate=permille / 1000, level_factors=((2, percent / 100),))
    assert method.count(SDXL[0], tokens) == keep_count(tokens, percent / 100 * (permille / 1000))
    assert method.count(SDXL[2], tokens) == keep_count(tokens, permille / 1000)


def test_a_span_of_one_layer_is_pruned_too_and_where_says_which() -> None:
    assert Matched().dense_layers == 0
    assert Matched().count(dataclasses.replace(SDXL[2], layers=1), 1000) == 300
    assert [Matched(where=not_second_level).count(place, 1000) for place in (SDXL[0], SDXL[2])] == [1000, 300]
