"""Ways around the whole attention map: blocks of rows give what the map gives, and some rows what those rows say."""

import logging
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atedm.method import attention_map, map_scores
from atedm.method.attention_map import mean_attention_map
from atedm.method.contract import QueriesAndKeys
from atedm.method.cover import lattice
from atedm.method.gwpr import rank_by_attention
from atedm.method.keep import keep_most_important
from atedm.method.map_scores import (
    WHOLE_MAP_TOKENS,
    Scores,
    scores_in_blocks,
    scores_of_map,
    scores_of_rows,
    self_attention_scores,
    source_in_blocks,
)
from atedm.method.matching import attention_source


def queries_and_keys(batch: int, heads: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k = ((3 * torch.randn(batch, heads, tokens, 8, generator=generator)).to(dtype) for _ in range(2))
    return q, k


# --- each way ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [1, 5000, 2**23])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 35), (1, 5, 64)])
def test_blocks_give_what_the_whole_map_gives(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention_map, "_BLOCK_BYTES", block)
    q, k = queries_and_keys(*shape, dtype)
    whole = rank_by_attention(q, k, 0.3, iterations=4)
    scores = scores_in_blocks(q, k, 0.3, iterations=4)
    torch.testing.assert_close(scores.importance, whole.importance, rtol=1e-4, atol=1e-7)
    keep = keep_most_important(whole.importance, max(1, shape[2] // 3))
    assert torch.equal(scores.source(keep), attention_source(whole.attention_map, keep))
    assert torch.equal(source_in_blocks(q, k, 0.3, keep), scores.source(keep))


@pytest.mark.parametrize("block", [1, 26_000, 2**23])  # one head at a time, two and then the third, all
def test_all_rows_give_what_the_whole_map_gives(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(attention_map, "_BLOCK_BYTES", block)
    q, k = queries_and_keys(2, 3, 40)
    whole = rank_by_attention(q, k, 0.3)
    scores = scores_of_rows(q, k, 0.3, torch.arange(40))
    torch.testing.assert_close(scores.importance, whole.importance, rtol=1e-4, atol=1e-7)
    keep = keep_most_important(whole.importance, 13)
    assert torch.equal(scores.source(keep), attention_source(whole.attention_map, keep))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.data())
def test_some_rows_stand_for_all(tokens: int, count: int, iterations: int, data: st.DataObject) -> None:
    """Against loops in float64: a graph in which only those queries pass importance on, and can be copied."""
    rows = sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1)))
    q, k = queries_and_keys(1, 2, tokens)
    scores = scores_of_rows(q, k, 0.3, torch.tensor(rows), iterations=iterations)
    a = torch.softmax(0.3 * q[0].double() @ k[0].double().mT, -1)
    per_head = []
    for head in a.tolist():
        s_q = [1 / len(rows)] * len(rows)
        for _ in range(iterations):
            s_k = [sum(s * head[row][j] for s, row in zip(s_q, rows, strict=True)) for j in range(tokens)]
            s_k = [s / sum(s_k) for s in s_k]
            s_q = [s_k[row] for row in rows]
            s_q = [s / sum(s_q) for s in s_q]
        per_head.append(s_k)
    expected = [(sum(s[j] ** 2 for s in per_head) / 2) ** 0.5 for j in range(tokens)]
    assert scores.importance is not None
    torch.testing.assert_close(scores.importance[0].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-7)
    keep = keep_most_important(scores.importance, min(count, tokens))
    source = scores.source(keep)[0].tolist()
    kept = keep[0].tolist()
    candidates = [row for row in rows if row in kept]
    mean = a.mean(0).tolist()
    for token in range(tokens):
        if token in kept:
            assert kept[source[token]] == token
        elif candidates:
            best = max(mean[row][token] for row in candidates)
            assert mean[kept[source[token]]][token] == pytest.approx(best, rel=1e-4)
            assert kept[source[token]] in candidates
        else:
            assert source[token] == 0


@pytest.mark.parametrize("way", [scores_of_map, scores_in_blocks, lambda *a, **b: scores_of_rows(*a[:3], a[3], **b)])
def test_without_iterations_there_is_the_copy_alone(way: object) -> None:
    assert callable(way)
    q, k = queries_and_keys(2, 3, 30)
    rows = (torch.arange(30),) if way not in (scores_of_map, scores_in_blocks) else ()
    scores: Scores = way(q, k, 0.3, *rows, iterations=0)
    keep = torch.tensor([[1, 5, 20], [0, 7, 29]])
    assert torch.equal(scores.source(keep), attention_source(mean_attention_map(q, k, 0.3), keep))


# --- which way --------------------------------------------------------------------------------------------------------


def heads_of(tokens: int, batch: int = 1) -> QueriesAndKeys:
    return QueriesAndKeys(*queries_and_keys(batch, 2, tokens), 0.3)


def same(found: Scores, expected: Scores) -> bool:
    assert found.importance is not None
    assert expected.importance is not None
    keep = keep_most_important(expected.importance, 100)
    return torch.equal(found.importance, expected.importance) and torch.equal(found.source(keep), expected.source(keep))


@torch.no_grad()
def test_up_to_1024_tokens_or_without_a_sample_it_is_the_whole_map() -> None:
    few, many = heads_of(WHOLE_MAP_TOKENS), heads_of(WHOLE_MAP_TOKENS + 32)
    assert same(self_attention_scores(few, sample=256, size=(32, 32)), scores_of_map(*few))
    assert same(self_attention_scores(many, sample=None, size=(33, 32)), scores_of_map(*many))


@pytest.mark.parametrize("sample", [1, 256, 5000])
@torch.no_grad()
def test_above_1024_tokens_it_is_a_sample_that_moves_with_the_step(sample: int) -> None:
    size = (33, 32)
    many = heads_of(33 * 32)
    found = {}
    for step in (0, 1):
        rows = keep_most_important(lattice(size, step=step)[None], min(sample, 33 * 32))[0]
        found[step] = self_attention_scores(many, sample=sample, size=size, step=torch.tensor(step))
        assert same(found[step], scores_of_rows(*many, rows))
    importances = [found[step].importance for step in (0, 1)]
    assert importances[0] is not None
    assert importances[1] is not None
    assert torch.equal(*importances) == (sample == 5000)  # of all tokens there is one sample only


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: no memory"), torch.OutOfMemoryError()],
)
def test_where_memory_runs_out_it_is_in_blocks_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    def full(*_: object, **__: object) -> Scores:
        raise error

    map_scores._say_once.cache_clear()
    monkeypatch.setattr(map_scores, "scores_of_map", full)
    attention = heads_of(200, batch=2)
    with caplog.at_level(logging.WARNING, "atedm"):
        found = [self_attention_scores(attention, sample=256, size=(10, 20)) for _ in range(2)]
    assert all(same(one, scores_in_blocks(*attention)) for one in found)
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["no memory for whole attention maps"]


def test_any_other_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Scores:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(map_scores, "scores_of_map", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        self_attention_scores(heads_of(20), sample=256, size=(4, 5))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_blocks_and_rows_hold_no_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched at the softmax, which every entry of a map comes out of."""
    largest, alive = 0, []
    softmax = torch.softmax

    def watched(*arguments: object, **options: object) -> Tensor:
        nonlocal largest
        a = softmax(*arguments, **options)  # type: ignore[call-overload]
        largest = max(largest, a.numel())
        assert sum(reference() is not None for reference in alive) <= 1, "a block is alive that no one needs"
        alive.append(weakref.ref(a))
        return a  # type: ignore[no-any-return]

    monkeypatch.setattr(attention_map, "_BLOCK_BYTES", 4 * 2 * 300 * 10)  # ten rows of two heads
    monkeypatch.setattr(torch, "softmax", watched)
    q, k = queries_and_keys(1, 2, 300)
    scores_in_blocks(q, k, 0.3).source(torch.arange(0, 300, 3)[None])
    assert largest == 2 * 300 * 10
    largest = 0
    scores_of_rows(q, k, 0.3, torch.arange(0, 300, 15))
    assert largest == 300 * 20  # the rows of one head


def test_every_way_compiles_and_never_waits_for_the_device() -> None:
    def rank(q: Tensor, k: Tensor, sample: int | None, size: tuple[int, int], step: Tensor) -> tuple[Tensor, Tensor]:
        scores = self_attention_scores(QueriesAndKeys(q, k, 0.3), sample=sample, size=size, step=step)
        assert scores.importance is not None
        return scores.importance, scores.source(keep_most_important(scores.importance, 9))

    for sample, size in ((256, (5, 6)), (16, (33, 32))):
        (q, k), step = queries_and_keys(1, 2, size[0] * size[1]), torch.tensor(3)
        torch._dynamo.reset()
        compiled = torch.compile(rank, fullgraph=True, backend="eager")(q, k, sample, size, step)
        for got, expected in zip(compiled, rank(q, k, sample, size, step), strict=True):
            torch.testing.assert_close(got, expected)
        # A meta tensor has no values, so whatever asks for one raises.
        assert rank(q.to("meta"), k.to("meta"), sample, size, step.to("meta"))[1].shape == q.shape[::2]
