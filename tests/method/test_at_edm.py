"""AT-EDM on a view made by hand: rank, drop and copy against loops in float64, functions of one's own, and counts."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.method.at_edm import DAGGER, TURBO, AtEdm, ToRefill
from atedm.method.contract import Cut, Memory, Method, Place, QueriesAndKeys, View
from atedm.method.cover import lattice
from atedm.method.keep import gather_tokens, keep_count, keep_most_important
from atedm.method.map_scores import WHOLE_MAP_TOKENS, scores_of_map, scores_of_rows
from atedm.method.places import only_second_level
from atedm.method.schedule import Early
from views import SDXL, after_layers, never, view_of

LARGE = (33, 32)  # more than 1,024 tokens


# --- the algorithm ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    data=st.data(),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.integers(1, 2),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_it_ranks_drops_and_copies_as_the_paper_says(
    data: st.DataObject, size: tuple[int, int], batch: int, iterations: int, seed: int
) -> None:
    view = view_of(size, data.draw(st.integers(1, size[0] * size[1])), batch=batch, seed=seed)
    q, k, scale = view.self_attention()
    cut = AtEdm(iterations=iterations).drop(view)
    expected = references.over_batch(references.importance, q, k, scale, "self-attention", "rms", iterations)
    torch.testing.assert_close(cut.importance, expected, check_dtype=False, rtol=1e-4, atol=1e-6)
    keep = references.over_batch(references.keep_most_important, cut.importance, view.count)
    assert torch.equal(cut.keep, keep)
    assert torch.equal(cut.tokens.double(), references.over_batch(references.gather_tokens, view.tokens, keep))
    assert cut.weights is None
    kept = after_layers(cut.tokens)
    mean_map = references.over_batch(references.mean_attention_map, q, k, scale)
    source = references.over_batch(references.attention_source, mean_map, keep)
    assert torch.equal(cut.refill(kept).double(), references.over_batch(references.gather_tokens, kept, source))


def test_the_papers_own_numbers() -> None:
    assert dataclasses.astuple(AtEdm())[:2] == (0.63, AtEdm().where)
    assert AtEdm() == AtEdm(rate=0.63, spare=Early(0.3, "F-L"), rank=None, refill=None, sample=256, iterations=3)
    view = view_of((32, 32), keep_count(1024, 0.63), batch=1, heads=1)
    assert AtEdm().drop(view).keep.shape == (1, 379)  # 37 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), LARGE])
def test_tokens_keep_their_dtype_and_two_runs_are_equal(size: tuple[int, int], dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    first, second = (AtEdm().drop(view_of(size, dtype=dtype)) for _ in range(2))
    kept = after_layers(first.tokens)
    assert first.tokens.dtype == first.refill(kept).dtype == dtype
    assert first.importance.dtype == torch.float32
    for one, other in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.refill(kept), second.refill(kept))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_above_1024_tokens_some_rows_stand_for_the_map_unless_all_are_asked_for(dtype: torch.dtype) -> None:
    tokens = LARGE[0] * LARGE[1]
    assert tokens > WHOLE_MAP_TOKENS
    view = view_of(LARGE, batch=1, dtype=dtype)
    for sample in (256, 40, None):
        cut = AtEdm(sample=sample).drop(view)
        if sample is None:
            scores = scores_of_map(*view.self_attention())
        else:
            rows = keep_most_important(lattice(LARGE, step=view.step)[None], sample)[0]
            scores = scores_of_rows(*view.self_attention(), rows)
        assert scores.importance is not None
        torch.testing.assert_close(cut.importance, scores.importance, rtol=1e-5, atol=1e-9)
        kept = after_layers(cut.tokens)
        assert torch.equal(cut.refill(kept), gather_tokens(kept, scores.source(cut.keep)))


def test_of_equal_tokens_the_first_are_kept_and_copied() -> None:
    zeros = torch.zeros(2, 2, 9, 4)
    flat = dataclasses.replace(view_of((3, 3), 4), self_attention=lambda: QueriesAndKeys(zeros, zeros, 0.5))
    cut = AtEdm().drop(flat)
    assert cut.keep.tolist() == [[0, 1, 2, 3]] * 2
    kept = after_layers(cut.tokens)
    assert torch.equal(cut.refill(kept)[:, 4:], kept[:, :1].expand(-1, 5, -1))


@pytest.mark.parametrize("count", [1, 23, 24])
def test_one_token_and_all_but_one_and_all(count: int) -> None:
    view = view_of((4, 6), count)
    cut = AtEdm().drop(view)
    filled = cut.refill(cut.tokens)
    assert torch.equal(gather_tokens(filled, cut.keep), cut.tokens)
    if count == 24:
        assert torch.equal(filled, view.tokens)


def test_gradients_go_through_the_tokens_and_not_through_the_choice() -> None:
    view = view_of((3, 4), 5)
    q, k, _ = view.self_attention()
    tokens = view.tokens.requires_grad_()
    for x in (q, k):
        x.requires_grad_()
    cut = AtEdm().drop(view)
    assert not cut.importance.requires_grad
    filled = cut.refill(cut.tokens)
    (gradient,) = torch.autograd.grad(filled.sum(), tokens)
    each = torch.zeros(2, 12).scatter(1, cut.keep, 1.0)
    assert torch.equal(gradient.abs().amax(-1) > 0, each.bool())  # a dropped token gives nothing
    assert gradient[..., 0].sum() == 2 * 12  # and a kept one as often as it is copied


@pytest.mark.parametrize("size", [(5, 6), LARGE])
def test_it_compiles_without_graph_break_and_never_waits_for_the_device(size: tuple[int, int]) -> None:
    view = view_of(size, batch=1, heads=1)

    method = AtEdm()

    def prune(tokens: Tensor, q: Tensor, k: Tensor, step: Tensor, protected: Tensor) -> Tensor:
        attention = QueriesAndKeys(q, k, 0.5)
        cut = method.drop(View(view.place, size, view.count, step, tokens, lambda: attention, never, protected))
        return cut.refill(2 * cut.tokens)

    q, k, _ = view.self_attention()
    arguments = (view.tokens, q, k, torch.tensor(4), (torch.arange(size[0] * size[1]) % 9 == 0).float())
    torch._dynamo.reset()
    compiled = torch.compile(prune, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), prune(*arguments))
    # A meta tensor has no values, so whatever asks for one raises.
    assert prune(*(x.to("meta") for x in arguments)).shape == view.tokens.shape


# --- protected tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AtEdm(), AtEdm(rank=lambda view: -view.tokens.abs().sum(-1))], ids=["paper", "own"])
def test_protected_tokens_are_kept_and_the_others_rank_as_before(method: AtEdm) -> None:
    protected = torch.zeros(24)
    protected[[1, 8, 23]] = 1
    free, cut = (method.drop(view_of(protected=mask)) for mask in (None, protected))
    for keep in cut.keep.tolist():
        assert {1, 8, 23} <= set(keep)
    others = protected == 0
    assert torch.equal(cut.importance[:, others], free.importance[:, others])
    for before, after in zip(free.importance, cut.keep.tolist(), strict=True):
        best = [i for i in before.argsort(descending=True, stable=True).tolist() if others[i]]
        assert set(after) - {1, 8, 23} == set(best[:5])  # five more make eight


# --- functions of one's own -------------------------------------------------------------------------------------------


def by_norm(view: View) -> Tensor:
    return view.tokens.float().square().sum(-1)


def as_it_was(given: ToRefill) -> Tensor:
    return given.before.scatter(1, given.keep.unsqueeze(-1).expand_as(given.kept), given.kept)


def test_an_own_ranking_chooses_and_the_copy_goes_by_attention_all_the_same() -> None:
    view = view_of()
    cut = AtEdm(rank=by_norm).drop(view)
    assert torch.equal(cut.importance, by_norm(view))
    assert torch.equal(cut.keep, keep_most_important(by_norm(view), view.count))
    kept = after_layers(cut.tokens)
    source = scores_of_map(*view.self_attention()).source(cut.keep)
    assert torch.equal(cut.refill(kept), gather_tokens(kept, source))


def test_an_own_refill_is_given_all_it_needs() -> None:
    seen: list[ToRefill] = []

    def refill(given: ToRefill) -> Tensor:
        seen.append(given)
        return as_it_was(given).double()

    view = view_of()
    cut, paper = AtEdm(refill=refill).drop(view), AtEdm().drop(view)
    assert torch.equal(cut.importance, paper.importance)
    assert torch.equal(cut.keep, paper.keep)
    kept = after_layers(cut.tokens)
    filled = cut.refill(kept)
    (given,) = seen
    assert torch.equal(given.kept, kept)
    assert torch.equal(given.before, view.tokens)
    assert torch.equal(given.keep, cut.keep)
    assert given.size == (4, 6)
    assert filled.dtype == kept.dtype
    assert torch.equal(filled, as_it_was(given))


def test_with_both_of_ones_own_no_attention_is_made() -> None:
    view = dataclasses.replace(view_of(), self_attention=never, cross_attention=never)
    cut = AtEdm(rank=by_norm, refill=as_it_was).drop(view)
    assert torch.equal(gather_tokens(cut.refill(cut.tokens), cut.keep), cut.tokens)


@pytest.mark.parametrize(
    ("rank", "found"),
    [
        (lambda view: view.tokens, (2, 24, 8)),
        (lambda view: view.tokens[:, 1:, 0], (2, 23)),
        (lambda view: view.tokens[0, :, 0], (24,)),
        (lambda view: [1.0, 2.0], "list"),
        (lambda view: None, "NoneType"),
    ],
)
def test_an_importance_of_another_shape_is_refused_by_name(rank: Any, found: object) -> None:
    said = f"must give a tensor of (2, 24), not {found}"
    with pytest.raises(ValueError, match=rf"^rank .*<lambda> {re.escape(said)}$"):
        AtEdm(rank=rank).drop(view_of())


@pytest.mark.parametrize(
    ("refill", "found"),
    [
        (lambda given: given.kept, (2, 8, 8)),
        (lambda given: given.before[..., :1], (2, 24, 1)),
        (lambda given: 0, "int"),
    ],
)
def test_a_refill_of_another_shape_is_refused_by_name(refill: Any, found: object) -> None:
    cut = AtEdm(refill=refill).drop(view_of())
    said = f"must give a tensor of (2, 24, 8), not {found}"
    with pytest.raises(ValueError, match=rf"^refill .*<lambda> {re.escape(said)}$"):
        cut.refill(cut.tokens)


# --- how many, where and when -----------------------------------------------------------------------------------------


def counts(method: Method, tokens: int = 1000, *, early: bool) -> dict[str, int]:
    return {place.name: method.count(place, tokens, early=early) for place in SDXL}


def test_the_paper_prunes_everywhere_and_spares_one_span_of_each_stage_in_early_steps() -> None:
    assert set(counts(AtEdm(), early=False).values()) == {370}
    early = counts(AtEdm(), early=True)
    assert {name for name, left in early.items() if left == 1000} == {"down.1.0", "down.2.0", "up.0.2", "up.1.2"}
    assert set(early.values()) == {370, 1000}


def test_dagger_leaves_the_second_level_alone_and_turbo_spares_nothing_early() -> None:
    second = {place.name for place in SDXL if place.level == 2}
    for method in (DAGGER, TURBO):
        late = counts(method, early=False)
        assert {name for name, left in late.items() if left == 1000} == second
    assert counts(TURBO, early=True) == counts(TURBO, early=False)
    early = counts(DAGGER, early=True)
    assert {name for name, left in early.items() if left == 1000} == second | {"down.2.0", "up.0.2"}


def test_where_and_spare_may_be_ones_own() -> None:
    class Never:
        def is_early(self, share: float) -> bool:
            return share >= 0.5

        def spares(self, place: Place) -> bool:
            return place.stage == "mid"

    method = AtEdm(where=lambda place: place.layers == 10, spare=Never())  # type: ignore[arg-type]
    assert [method.is_early(share) for share in (0.0, 0.5)] == [False, True]
    assert {name for name, left in counts(method, early=True).items() if left < 1000} == {
        place.name for place in SDXL if place.layers == 10 and place.stage != "mid"
    }
    assert {name for name, left in counts(AtEdm(where=only_second_level), early=False).items() if left < 1000} == {
        place.name for place in SDXL if place.level == 2
    }


@given(tokens=st.integers(1, 20000), permille=st.integers(0, 999), layers=st.integers(1, 12))
def test_a_span_of_one_layer_has_nothing_left_to_run_on_fewer(tokens: int, permille: int, layers: int) -> None:
    place = Place("mid", 1, 0, 1, layers, "mid.0")
    left = AtEdm(rate=permille / 1000).count(place, tokens)
    assert left == (tokens if layers == 1 else keep_count(tokens, permille / 1000))


def test_it_is_early_for_the_first_15_of_50_steps_and_remembers_nothing() -> None:
    assert [AtEdm().is_early(i / 50) for i in range(50)] == [True] * 15 + [False] * 35
    assert not any(TURBO.is_early(i / 50) for i in range(50))
    assert not AtEdm().remembers
    memory = Memory()
    cut: Cut = AtEdm().drop(view_of(memory=memory))
    cut.refill(cut.tokens)
    assert memory == Memory()
