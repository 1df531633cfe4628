"""Whom a dropped token is refilled from: by the paper's example, and against loops in float64."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.method import matching
from atedm.method.keep import gather_tokens
from atedm.method.matching import attention_source, dropped_tokens, match_by_features


def make(batch: int, tokens: int, channels: int = 3, seed: int = 0, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens, and the indices of some of them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, tokens, channels, generator=generator)
    kept = max(1, tokens * 2 // 5) if kept is None else kept
    return features, torch.rand(batch, tokens, generator=generator).argsort(-1)[:, :kept].sort(-1).values


def random_map(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_the_example_in_the_docstring() -> None:
    result = doctest.testmod(matching)
    assert result.attempted >= 7
    assert result.failed == 0


def test_the_papers_example() -> None:
    # Seven tokens, 3, 5 and 7 are kept. Rows are queries; each row sums to 1.
    a = torch.tensor(
        [
            [0.10, 0.10, 0.50, 0.05, 0.10, 0.05, 0.10],
            [0.10, 0.10, 0.10, 0.10, 0.40, 0.10, 0.10],
            [0.10, 0.30, 0.15, 0.25, 0.10, 0.05, 0.05],
            [0.05, 0.10, 0.10, 0.10, 0.15, 0.10, 0.40],
            [0.15, 0.10, 0.15, 0.10, 0.25, 0.10, 0.15],
            [0.10, 0.10, 0.10, 0.10, 0.50, 0.05, 0.05],
            [0.30, 0.05, 0.10, 0.05, 0.10, 0.25, 0.15],
        ]
    )[None]
    torch.testing.assert_close(a.sum(-1), torch.ones(1, 7))
    keep = torch.tensor([[3, 5, 7]]) - 1

    def arrows(a: Tensor) -> dict[int, int]:
        source = keep.gather(1, attention_source(a, keep))[0] + 1
        return {pruned: int(source[pruned - 1]) for pruned in (1, 2, 4, 6)}

    paper = {1: 7, 2: 3, 4: 3, 6: 7}
    assert arrows(a) == paper
    # The other reading, whom the pruned token attends to, gives none of these arrows.
    assert not arrows(a.mT).items() & paper.items()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 14), seed=st.integers(0, 1000))
def test_sources_match_the_formula(data: st.DataObject, batch: int, tokens: int, seed: int) -> None:
    kept = data.draw(st.integers(1, tokens))
    features, keep = make(batch, tokens, seed=seed, kept=kept)
    a = random_map(batch, tokens, seed)
    by_attention = attention_source(a, keep)
    match = match_by_features(features, keep)
    for source in (by_attention, match.source):
        assert source.dtype == torch.int64
        # Kept tokens point to themselves.
        assert torch.equal(source.gather(1, keep), torch.arange(kept).expand(batch, kept))
    assert torch.equal(by_attention, references.over_batch(references.attention_source, a, keep))
    assert torch.equal(match.source, references.over_batch(references.nearest_source, features, keep))
    apart = (features.double() - gather_tokens(features.double(), keep.gather(1, match.source))).square().sum(-1)
    dropped = dropped_tokens(keep, tokens)
    found = match.similarity.gather(1, dropped)
    torch.testing.assert_close(found.double(), -apart.gather(1, dropped), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 20))
def test_dropped_are_those_not_kept(data: st.DataObject, batch: int, tokens: int) -> None:
    _, keep = make(batch, tokens, kept=data.draw(st.integers(1, tokens)))
    for kept, dropped in zip(keep.tolist(), dropped_tokens(keep, tokens).tolist(), strict=True):
        assert dropped == [token for token in range(tokens) if token not in kept]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(2, 120),
    width=st.sampled_from([1, 3, 40, 640]),
    batch=st.integers(1, 3),
    share=st.floats(0.01, 0.99),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_in_sixteen_bits_the_match_is_the_nearest_but_for_a_hundredth(
    tokens: int, width: int, batch: int, share: float, offset: float
) -> None:
    """A product of 8 bits would be wrong by several hundredths of |a|^2, which is many times the nearest distance."""
    generator = torch.Generator().manual_seed(tokens * width)
    features = (torch.randn(batch, tokens, width, generator=generator) + offset).bfloat16()
    kept = max(1, int(share * tokens))
    keep = torch.stack([torch.randperm(tokens, generator=generator)[:kept].sort().values for _ in range(batch)])
    source, similarity = match_by_features(features, keep)
    apart = (features.double().unsqueeze(2) - gather_tokens(features.double(), keep).unsqueeze(1)).square().sum(-1)
    found = apart.gather(2, source.unsqueeze(-1)).squeeze(-1)
    is_dropped = torch.ones(batch, tokens).scatter(1, keep, 0.0).bool()
    nearest = apart.amin(-1)
    assert (found <= 1.01 * nearest + 1e-5 * features.double().square().sum(-1))[is_dropped].all()
    torch.testing.assert_close(similarity.double()[is_dropped], -found[is_dropped], rtol=1e-4, atol=1e-6)
    assert torch.equal(source.gather(1, keep), torch.arange(kept).expand(batch, kept))


def test_pieces_of_a_large_product_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    features, keep = make(2, 37)
    whole = match_by_features(features, keep)
    monkeypatch.setattr(matching, "_CHUNK", 2 * keep.shape[1] * 3)
    pieces = match_by_features(features, keep)
    assert torch.equal(pieces.source, whole.source)
    torch.testing.assert_close(pieces.similarity, whole.similarity)


def test_sources_of_bfloat16_are_those_of_the_rounded_values() -> None:
    a, (_, keep) = random_map(2, 40).bfloat16(), make(2, 40)
    assert torch.equal(attention_source(a, keep), references.over_batch(references.attention_source, a, keep))


def test_autocast_changes_nothing() -> None:
    features, keep = make(2, 40, channels=8)
    features = 1 + 0.05 * features  # distances that 8 bits of a product would mix up
    expected = match_by_features(features, keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = match_by_features(features, keep)
    assert torch.equal(within.source, expected.source)
    assert torch.equal(within.similarity, expected.similarity)


def test_of_equal_entries_the_first_kept_token_is_copied() -> None:
    keep = torch.tensor([[1, 3]])
    assert attention_source(torch.full((1, 5, 5), 0.2), keep).tolist() == [[0, 0, 0, 1, 0]]
    for dtype in (torch.float32, torch.bfloat16):
        assert match_by_features(torch.ones(1, 5, 2, dtype=dtype), keep).source.tolist() == [[0, 0, 0, 1, 0]]


def test_distance_tells_long_from_short() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [9.0, 0.1], [8.0, 0.0], [1.0, 0.5]]])
    assert match_by_features(tokens, torch.tensor([[0, 1]])).source.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("kept", [1, 9])
def test_one_kept_token_and_all_of_them(kept: int) -> None:
    features, keep = make(2, 9, kept=kept)
    expected = torch.arange(9) if kept == 9 else torch.zeros(9, dtype=torch.int64)
    assert torch.equal(match_by_features(features, keep).source, expected.expand(2, -1))
    assert torch.equal(attention_source(random_map(2, 9), keep), expected.expand(2, -1))


def test_matches_compile_without_graph_break_and_never_wait_for_the_device() -> None:
    def match(features: Tensor, a: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        return (*match_by_features(features, keep), attention_source(a, keep))

    (features, keep), a = make(2, 15), random_map(2, 15)
    torch._dynamo.reset()
    compiled = torch.compile(match, fullgraph=True, backend="eager")(features, a, keep)
    for got, expected in zip(compiled, match(features, a, keep), strict=True):
        torch.testing.assert_close(got, expected)
    # A meta tensor has no values, so whatever asks for one raises.
    assert match(features.to("meta"), a.to("meta"), keep.to("meta"))[0].shape == (2, 15)
