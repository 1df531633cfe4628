"""Ways around the whole attention map: blocks of rows give what the map gives, and some rows what those rows say."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import atedm
from atedm import attention_map
from atedm.config import PRESETS, PruningConfig
from atedm.costs.formula import block_macs
from atedm.map_modes import scores_in_blocks, scores_of_rows, source_in_blocks
from atedm.matching import attention_source
from atedm.patching.summary import WORDS
from atedm.pruning import keep_most_important
from atedm.ranking import HEAD_FUSIONS, rank_by_attention
from models import distance, inputs, run, sdxl_unet
from test_cost import count, whole_blocks


def queries_and_keys(batch: int, heads: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k = ((3 * torch.randn(batch, heads, tokens, 8, generator=generator)).to(dtype) for _ in range(2))
    return q, k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fusion", HEAD_FUSIONS)
@pytest.mark.parametrize("block", [1, 5000, 2**23])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 35), (1, 5, 64)])
def test_blocks_give_what_the_whole_map_gives(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], block: int, fusion: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention_map, "_BLOCK_BYTES", block)
    q, k = queries_and_keys(*shape, dtype)
    whole = rank_by_attention(q, k, 0.3, head_fusion=fusion, iterations=4)
    scores = scores_in_blocks(q, k, 0.3, head_fusion=fusion, iterations=4)
    torch.testing.assert_close(scores.importance, whole.importance, rtol=1e-4, atol=1e-7)
    keep = keep_most_important(whole.importance, max(1, shape[2] // 3))
    assert torch.equal(scores.source(keep), attention_source(whole.attention_map, keep))
    assert torch.equal(source_in_blocks(q, k, 0.3, keep), scores.source(keep))


@pytest.mark.parametrize("fusion", HEAD_FUSIONS)
@pytest.mark.parametrize("block", [1, 26_000, 2**23])  # one head at a time, two and then the third, all
def test_all_rows_give_what_the_whole_map_gives(monkeypatch: pytest.MonkeyPatch, block: int, fusion: str) -> None:
    monkeypatch.setattr(attention_map, "_BLOCK_BYTES", block)
    q, k = queries_and_keys(2, 3, 40)
    whole = rank_by_attention(q, k, 0.3, head_fusion=fusion)
    scores = scores_of_rows(q, k, 0.3, torch.arange(40), head_fusion=fusion)
    torch.testing.assert_close(scores.importance, whole.importance, rtol=1e-4, atol=1e-7)
    keep = keep_most_important(whole.importance, 13)
    assert torch.equal(scores.source(keep), attention_source(whole.attention_map, keep))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.data())
def test_some_rows_stand_for_all(tokens: int, count: int, iterations: int, data: st.DataObject) -> None:
    """Against loops in float64: a graph in which only those queries pass importance on, and can be copied."""
    rows = sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1)))
    q, k = queries_and_keys(1, 2, tokens)
    scores = scores_of_rows(q, k, 0.3, torch.tensor(rows), iterations=iterations)
    a = torch.softmax(0.3 * q[0].double() @ k[0].double().mT, -1)
    per_head = []
    for head in a:
        s_q = [1 / len(rows)] * len(rows)
        for _ in range(iterations):
            s_k = [sum(s * float(head[row, j]) for s, row in zip(s_q, rows, strict=True)) for j in range(tokens)]
            s_k = [s / sum(s_k) for s in s_k]
            s_q = [s_k[row] for row in rows]
            s_q = [s / sum(s_q) for s in s_q]
        per_head.append(s_k)
    expected = [(sum(s[j] ** 2 for s in per_head) / 2) ** 0.5 for j in range(tokens)]
    torch.testing.assert_close(scores.importance[0].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-7)
    keep = keep_most_important(scores.importance, min(count, tokens))
    source = scores.source(keep)[0].tolist()
    kept = keep[0].tolist()
    candidates = [row for row in rows if row in kept]
    for token in range(tokens):
        if token in kept:
            assert kept[source[token]] == token
        elif candidates:
            best = max(float(a[:, row, token].mean()) for row in candidates)
            assert float(a[:, kept[source[token]], token].mean()) == pytest.approx(best, rel=1e-4)
            assert kept[source[token]] in candidates
        else:
            assert source[token] == 0


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(map_mode="blocked"),
        PruningConfig(map_mode="blocked", ranking="attention-received"),
        PruningConfig(map_mode="blocked", ranking="uniform-random"),
        PruningConfig(map_mode="blocked", gradual=((0, 0.3), (1, 0.4)), head_fusion="mean-map"),
        PruningConfig(map_mode="sampled", sampled_rows=9999),
        PruningConfig(map_mode="sampled", sampled_rows=9999, ranking="attention-received"),
        PruningConfig(map_mode="sampled", tolerance=1e-6),
    ],
    ids=str,
)
def test_a_pruned_unet_gives_the_same_by_blocks_and_by_all_rows(config: PruningConfig) -> None:
    unet = sdxl_unet()
    with atedm.pruned(unet, config.replace(map_mode="full")):
        expected = run(unet)
    with atedm.pruned(unet, config):
        torch.testing.assert_close(run(unet), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"head_fusion": "mean-map"}, {"ranking": "attention-received"}], ids=str)
def test_what_kernels_take_is_what_plain_products_in_their_place_take(changes: dict[str, Any]) -> None:
    config = PruningConfig(map_mode="triton", **changes)
    triton = atedm.cost("tiny", config)  # which refuses to report what torch does not count
    blocked = atedm.cost("tiny", config.replace(map_mode="blocked"))
    assert triton.figures().normal_step > blocked.figures().normal_step


def test_few_rows_make_another_image_that_moves_with_the_step() -> None:
    unet = sdxl_unet()
    steps = torch.full((4,), 500)
    with atedm.pruned(unet, PruningConfig(schedule="constant")):
        whole = run(unet, steps[0])
    with atedm.pruned(unet, PruningConfig(map_mode="sampled", sampled_rows=4, schedule="constant")):
        first, second, again = run(unet, steps[0]), run(unet, steps[1]), run(unet, steps[0])
    assert torch.equal(first, again)
    assert min(distance(first, whole), distance(first, second)) > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"map_mode": "blocked"},
        {"map_mode": "blocked", "ranking": "attention-received"},
        {"map_mode": "blocked", "ranking": "uniform-random"},
        {"map_mode": "blocked", "recovery": "direct-copy", "iterations": 2},
        {"map_mode": "flash"},
        {"map_mode": "flash", "ranking": "attention-received", "recovery": "direct-copy"},
        {"map_mode": "flash", "ranking": "uniform-random"},
        {"map_mode": "sampled", "sampled_rows": 6},
        {"map_mode": "sampled", "sampled_rows": 6, "ranking": "uniform-random"},
        {"map_mode": "sampled", "sampled_rows": 6, "head_fusion": "mean-map", "ranking": "attention-received"},
    ],
    ids=str,
)
def test_what_it_takes_is_what_torch_counts(changes: dict[str, Any]) -> None:
    unet = sdxl_unet()
    config = PRESETS["paper"].replace(schedule="constant", **changes)
    with atedm.pruned(unet, config) as summary:
        counter = count(unet, 1, inputs(unet, batch=1, words=WORDS))
    expected = sum(block_macs(shape, config).exact for shape in summary.shapes)
    assert whole_blocks(unet, counter, summary) == expected
