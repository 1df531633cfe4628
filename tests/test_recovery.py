import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm import matching
from atedm.matching import (
    attention_source,
    attention_weights,
    distance_weights,
    match_by_features,
    nearest_source,
)
from atedm.pruning import gather_tokens, keep_count, keep_most_important
from atedm.ranking import rank_by_attention
from atedm.recovery import (
    bicubic_interpolation,
    direct_copy,
    matched_update,
    mean_by_source,
    similarity_copy,
    update_of_match,
    weighted_update,
    with_own_update,
    zero_padding,
)

SIZES = [(1, 1), (4, 4), (3, 5), (5, 2), (1, 6), (7, 7)]  # h, w


def make(batch: int, tokens: int, channels: int = 3, seed: int = 0, kept: int | None = None) -> tuple[Tensor, ...]:
    """Tokens of all positions, and the indices and new values of some of them."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(batch, tokens, channels, generator=generator)
    kept = max(1, tokens * 2 // 5) if kept is None else kept
    keep = torch.rand(batch, tokens, generator=generator).argsort(-1)[:, :kept].sort(-1).values
    return before, keep, torch.randn(batch, kept, channels, generator=generator)


def random_map(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


# --- whom to copy from ------------------------------------------------------------------------------------------------


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
    before, keep, _ = make(batch, tokens, seed=seed, kept=kept)
    a = random_map(batch, tokens, seed)
    by_attention = attention_source(a, keep)
    by_cosine = match_by_features(before, keep, "cosine").source
    for source in (by_attention, by_cosine):
        assert source.dtype == torch.int64
        # Kept tokens point to themselves.
        assert torch.equal(source.gather(1, keep), torch.arange(kept).expand(batch, kept))
    assert torch.equal(by_attention, references.over_batch(references.attention_source, a, keep))
    assert torch.equal(by_cosine, references.over_batch(references.cosine_source, before, keep))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    by=st.sampled_from(["cosine", "euclidean"]),
    window=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 99),
)
def test_matches_are_the_most_similar_kept_tokens(
    data: st.DataObject, size: tuple[int, int], by: str, window: int | None, seed: int
) -> None:
    tokens = size[0] * size[1]
    kept = data.draw(st.integers(1, tokens))
    before, keep, _ = make(2, tokens, seed=seed, kept=kept)
    match = match_by_features(before, keep, by, window=window, size=size)
    assert torch.equal(match.source.gather(1, keep), torch.arange(kept).expand(2, kept))
    for image, kept_here, source, similarity in zip(before.double(), keep.tolist(), *match, strict=True):
        features = torch.nn.functional.normalize(image, dim=-1) if by == "cosine" else image
        alike = features @ features.T if by == "cosine" else -(torch.cdist(features, features) ** 2)
        for token in range(tokens):
            if token in kept_here:
                continue

            def apart(other: int, token: int = token) -> tuple[int, int]:
                return (abs(token // size[1] - other // size[1]), abs(token % size[1] - other % size[1]))

            near = [i for i in kept_here if window is None or max(apart(i)) <= window]
            if near:
                best = max(near, key=lambda i, token=token: float(alike[token, i]))  # type: ignore[misc]
                assert float(similarity[token]) == pytest.approx(float(alike[token, best]), abs=1e-4)
            else:
                best = min(kept_here, key=lambda i: apart(i)[0] ** 2 + apart(i)[1] ** 2)
            assert kept_here[int(source[token])] == best


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(2, 200),
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
    before, keep, _ = make(2, 37)
    whole = match_by_features(before, keep)
    monkeypatch.setattr(matching, "_CHUNK", 2 * keep.shape[1] * 3)
    pieces = match_by_features(before, keep)
    assert torch.equal(pieces.source, whole.source)
    torch.testing.assert_close(pieces.similarity, whole.similarity)


@pytest.mark.parametrize("size", SIZES)
def test_places_alone_match_or_weigh_by_distance(size: tuple[int, int]) -> None:
    _, keep, _ = make(2, size[0] * size[1])
    source, weights = nearest_source(keep, size), distance_weights(keep, size)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, size[0] * size[1]))
    for b in range(2):
        for token in range(size[0] * size[1]):
            squares = [
                (token // size[1] - i // size[1]) ** 2 + (token % size[1] - i % size[1]) ** 2 for i in keep[b].tolist()
            ]
            assert squares[int(source[b, token])] == min(squares)
            inverse = [1 / max(1, square) for square in squares]
            expected = torch.tensor(inverse) / sum(inverse)
            torch.testing.assert_close(weights[b, token], expected, rtol=1e-5, atol=1e-6)


def test_attention_weights_are_shares_of_a_column() -> None:
    a, keep = random_map(2, 9), make(2, 9)[1]
    rows = gather_tokens(a, keep)
    expected = (rows / rows.sum(1, keepdim=True)).mT
    torch.testing.assert_close(attention_weights(a, keep), expected)


def test_sources_of_bfloat16_are_those_of_the_rounded_values() -> None:
    # Nothing is rounded again: argmax compares what it is given, and cosines are taken in float32.
    noise, keep, _ = make(2, 40, channels=8)
    before, a = (1 + 0.05 * noise).bfloat16(), random_map(2, 40).bfloat16()  # cosines so near 1 that 8 bits mix them up
    assert torch.equal(attention_source(a, keep), references.over_batch(references.attention_source, a, keep))
    expected = references.over_batch(references.cosine_source, before, keep)
    assert torch.equal(match_by_features(before, keep, "cosine").source, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(match_by_features(before, keep, "cosine").source, expected)


def test_of_equal_entries_the_first_kept_token_is_copied() -> None:
    a = torch.full((1, 5, 5), 0.2)
    keep = torch.tensor([[1, 3]])
    assert attention_source(a, keep).tolist() == [[0, 0, 0, 1, 0]]
    assert match_by_features(torch.ones(1, 5, 2), keep, "cosine").source.tolist() == [[0, 0, 0, 1, 0]]


def test_cosine_ignores_length_and_survives_a_zero_token() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 100.0], [5.0, 1.0], [0.0, 0.0]]])
    keep = torch.tensor([[0, 1]])
    assert match_by_features(tokens, keep, "cosine").source.tolist() == [
        [0, 1, 0, 0]
    ]  # the dot product would say 1 for token 2


def test_euclidean_tells_long_from_short() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [9.0, 0.1], [8.0, 0.0], [1.0, 0.5]]])
    keep = torch.tensor([[0, 1]])
    assert match_by_features(tokens, keep, "cosine").source.tolist() == [[0, 1, 0, 1]]
    assert match_by_features(tokens, keep, "euclidean").source.tolist() == [[0, 1, 1, 0]]


# --- what to fill in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6, 15])
def test_copies_and_zeros_match_the_formula(tokens: int, dtype: torch.dtype) -> None:
    before, keep, kept_tokens = make(2, tokens)
    before, kept_tokens = before.to(dtype), kept_tokens.to(dtype)
    source = attention_source(random_map(2, tokens), keep)
    for out, expected in [
        (similarity_copy(kept_tokens, source), references.over_batch(references.gather_tokens, kept_tokens, source)),
        (
            direct_copy(kept_tokens, keep, before),
            references.over_batch(references.direct_copy, kept_tokens, keep, before),
        ),
        (
            zero_padding(kept_tokens, keep, tokens),
            references.over_batch(references.zero_padding, kept_tokens, keep, tokens),
        ),
    ]:
        assert out.dtype == dtype
        assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_matches_the_formula(size: tuple[int, int]) -> None:
    _, keep, kept_tokens = make(2, size[0] * size[1])
    out = bicubic_interpolation(kept_tokens, keep, size)
    expected = references.over_batch(references.bicubic_interpolation, kept_tokens, keep, size)
    torch.testing.assert_close(out, expected, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert torch.equal(gather_tokens(out, keep), kept_tokens)  # bit for bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bicubic_interpolates_half_precision_in_float32(dtype: torch.dtype) -> None:
    _, keep, kept_tokens = make(2, 35)
    out = bicubic_interpolation(kept_tokens.to(dtype), keep, (5, 7))
    assert out.dtype == dtype
    # Only the result is rounded.
    expected = bicubic_interpolation(kept_tokens.to(dtype).float(), keep, (5, 7)).to(dtype)
    assert torch.equal(out, expected)


def test_bicubic_fades_far_from_kept_tokens() -> None:
    # The paper's objection: a dropped token among dropped tokens gets almost nothing.
    size = (12, 12)
    out = bicubic_interpolation(torch.ones(1, 1, 1), torch.tensor([[0]]), size).view(size)
    assert out[1, 1].abs() > 0.1
    assert out[6:, 6:].abs().max() < 1e-6


def fill(name: str, kept_tokens: Tensor, keep: Tensor, before: Tensor, a: Tensor, size: tuple[int, int]) -> Tensor:
    if name == "similarity":
        return similarity_copy(kept_tokens, attention_source(a, keep))
    if name == "cosine":
        return similarity_copy(kept_tokens, match_by_features(before, keep, "cosine").source)
    if name == "direct":
        return direct_copy(kept_tokens, keep, before)
    if name == "zero":
        return zero_padding(kept_tokens, keep, before.shape[1])
    if name == "matched":
        return matched_update(kept_tokens, gather_tokens(before, keep), before, match_by_features(before, keep).source)
    if name == "weighted":
        return weighted_update(kept_tokens, keep, before, distance_weights(keep, size))
    return bicubic_interpolation(kept_tokens, keep, size)


FILLS = ["similarity", "cosine", "direct", "zero", "bicubic", "matched", "weighted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_added_to_what_a_token_was(dtype: torch.dtype) -> None:
    before, keep, kept_tokens = (x.to(dtype) if x.is_floating_point() else x for x in make(2, 15))
    source = match_by_features(before, keep).source
    start = gather_tokens(before, keep)
    out = matched_update(kept_tokens, start, before, source)
    update = kept_tokens.double() - start.double()
    exact = before.double() + gather_tokens(update, source)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
    torch.testing.assert_close(gather_tokens(out, keep), kept_tokens, rtol=1e-6, atol=1e-6)  # not rounded twice
    weights = distance_weights(keep, (3, 5))
    out = weighted_update(kept_tokens, keep, before, weights)
    exact = before.double() + weights.double() @ update
    exact = exact.scatter(1, keep.unsqueeze(-1).expand_as(kept_tokens), kept_tokens.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_a_merged_start_is_the_mean_of_those_who_match_and_weights_add_up() -> None:
    tokens, keep, _ = make(2, 11)
    source = match_by_features(tokens, keep).source
    each = torch.rand(2, 11, generator=torch.Generator().manual_seed(5)) + 0.5
    gathered = torch.zeros(keep.shape).scatter_add(1, source, each)
    merged = mean_by_source(tokens, source, each, gathered)
    for b in range(2):
        for k in range(keep.shape[1]):
            who = [i for i in range(11) if int(source[b, i]) == k]
            weights = each[b, who].double()
            assert float(gathered[b, k]) == pytest.approx(float(weights.sum()), rel=1e-5)
            expected = (tokens[b, who].double() * weights.unsqueeze(1)).sum(0) / weights.sum()
            torch.testing.assert_close(merged[b, k].double(), expected, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("name", FILLS)
def test_gradients(name: str) -> None:
    before, keep, kept_tokens = make(2, 12, channels=2)
    before = before.double().requires_grad_()
    kept_tokens = kept_tokens.double().requires_grad_()
    a = random_map(2, 12)
    assert torch.autograd.gradcheck(lambda x, y: fill(name, x, keep, y, a, (3, 4)), (kept_tokens, before))
    (gradient,) = torch.autograd.grad(fill(name, kept_tokens, keep, before, a, (3, 4)).sum(), kept_tokens)
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
        return fill(name, 2 * gather_tokens(before, keep), keep, before, ranked.attention_map, (3, 5))

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
        fill(name, kept_tokens, keep, before, random_map(1, 12), (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
