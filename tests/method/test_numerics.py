"""Numbers: 16-bit floats of large images, large logits, ties and flat maps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atedm.method.at_edm import AtEdm
from atedm.method.gwpr import gwpr
from atedm.method.keep import keep_most_important
from atedm.method.map_scores import Scores, scores_in_blocks, scores_of_map, scores_of_rows
from atedm.method.matched import Matched
from atedm.method.matching import match_by_features
from views import after_layers, view_of

HALVES = [torch.float16, torch.bfloat16]
MODES: dict[str, Callable[[Tensor, Tensor, float], Scores]] = {
    "full": scores_of_map,
    "blocked": scores_in_blocks,
    "sampled": lambda q, k, scale: scores_of_rows(q, k, scale, torch.arange(0, q.shape[2], 7)),
}


# --- large images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_the_ranking_of_many_tokens_neither_overflows_nor_underflows(dtype: torch.dtype) -> None:
    tokens, scale = 4096, 0.25
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(1, 1, tokens, 8, generator=generator) for _ in "qk")
    q, k = q.to(dtype), k.to(dtype)
    importance = scores_in_blocks(q, k, scale, iterations=1).importance
    assert importance is not None
    assert importance.dtype == torch.float32
    assert torch.isfinite(importance).all()
    assert (importance > 0).all()
    # Some rows at a time, for the same rounded q and k, the products not rounded and the sums in float64.
    s = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
    received = torch.zeros_like(s)
    for rows in torch.arange(tokens).split(2048):
        a = torch.softmax(scale * q[0, 0, rows].float() @ k[0, 0].float().T, dim=-1)
        received += (s[rows].float() @ a).double()
    s = received / received.sum()
    relative = (importance[0] - s).abs() / s
    # Logits of up to 40 are rounded to within 2^-6 in float16 and 2^-3 in bfloat16; over the rows that averages out.
    assert relative.median() < (2e-3 if dtype == torch.float16 else 3e-2)
    kept = keep_most_important(importance, tokens // 3)[0]
    best = keep_most_important(s[None].float(), tokens // 3)[0]
    assert len(set(kept.tolist()) & set(best.tolist())) > 0.98 * len(best)


@pytest.mark.parametrize("dtype", HALVES)
def test_matches_of_large_features_are_those_of_float32(dtype: torch.dtype) -> None:
    """Squares of features as large as a U-Net's leave the range of float16 when summed."""
    generator = torch.Generator().manual_seed(0)
    tokens = (300 * torch.randn(1, 256, 320, generator=generator)).to(dtype)
    keep = torch.arange(0, 256, 3)[None]
    found, exact = match_by_features(tokens, keep), match_by_features(tokens.double(), keep)
    assert torch.isfinite(found.similarity).all()
    agreeing = (found.source == exact.source).double().mean()
    assert agreeing > (0.8 if dtype == torch.bfloat16 else 0.999)


# --- Logits that are large --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1.0, 40.0, 400.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_logits_beyond_a_type_give_an_order_all_the_same(mode: str, size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = ((size * torch.randn(2, 2, 40, 16, generator=generator)).to(dtype) for _ in "qk")
    found: Scores = MODES[mode](q, k, 0.25)
    assert found.importance is not None
    assert torch.isfinite(found.importance).all()
    assert (found.importance >= 0).all()
    keep = keep_most_important(found.importance, 13)
    source = found.source(keep)
    assert ((source >= 0) & (source < 13)).all()


# --- Ties and flat things ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_flat_map_ranks_all_alike_and_the_first_are_kept(mode: str) -> None:
    q = k = torch.zeros(3, 2, 49, 8)
    found: Scores = MODES[mode](q, k, 0.3)
    assert found.importance is not None
    torch.testing.assert_close(found.importance, torch.full((3, 49), 1 / 49))
    if mode != "sampled":
        assert torch.equal(keep_most_important(found.importance, 5), torch.arange(5).expand(3, -1))
        assert torch.equal(found.source(torch.tensor([[0, 5, 9]] * 3))[:, 10:], torch.zeros(3, 39, dtype=torch.int64))
    assert torch.equal(gwpr(torch.full((1, 49, 49), 1 / 49)).argsort(stable=True), torch.arange(49)[None])


def test_ties_are_broken_by_place_whatever_the_number() -> None:
    for tokens in (2, 31, 256, 4096, 16_384):
        importance = torch.arange(tokens).remainder(3).float()[None]
        count = tokens // 2
        kept = keep_most_important(importance, count)[0]
        expected = sorted(range(tokens), key=lambda place: (-(place % 3), place))[:count]
        assert kept.tolist() == sorted(expected)


@pytest.mark.parametrize("method", [AtEdm(), Matched()], ids=["paper", "matched"])
def test_torchs_default_dtype_does_not_matter(method: AtEdm | Matched) -> None:
    views = [view_of((5, 6)) for _ in range(2)]
    kept = after_layers(view_of((5, 6), 10).tokens[:, :10])
    cut = method.drop(views[0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = method.drop(views[1])
        assert torch.equal(other.keep, cut.keep)
        assert torch.equal(other.importance, cut.importance)
        assert torch.equal(other.refill(kept), cut.refill(kept))
    finally:
        torch.set_default_dtype(torch.float32)
