"""G-WPR on self-attention: Algorithm 1 against loops in float64, over heads, and in one pass over the maps.

What it does with the mappings of cross-attention is in tests/lab/ablation/test_mappings.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.method import gwpr as module
from atedm.method.attention_map import mean_attention_map
from atedm.method.gwpr import gwpr, normalise, rank_by_attention, root_mean_square, self_attention
from one_map import watch_maps

SIZES = [1, 5, 8]  # tokens


def random_map(*shape: int, sharpness: float = 2.0, seed: int = 0) -> Tensor:
    logits = sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(-1)


def queries_and_keys(batch: int, heads: int, m: int, n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Twice the usual spread, so that some entries pass the hard clip; more, and rows get so sharp that their entropy
    # is lost in the rounding of the map.
    return (
        2 * torch.randn(batch, heads, m, width, generator=generator),
        torch.randn(batch, heads, n, width, generator=generator),
    )


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("tokens", SIZES)
def test_gwpr_matches_algorithm_1(tokens: int, iterations: int) -> None:
    a = random_map(3, tokens, tokens)
    s = gwpr(a, iterations=iterations)
    assert s.dtype == torch.float32
    expected = references.over_batch(references.gwpr, a, "self-attention", iterations)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=2e-5, atol=1e-7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 9), iterations=st.integers(1, 6), sharpness=st.floats(0.1, 5.0), seed=st.integers(0, 1000))
def test_gwpr_on_any_map(tokens: int, iterations: int, sharpness: float, seed: int) -> None:
    a = random_map(2, tokens, tokens, sharpness=sharpness, seed=seed)
    s = gwpr(a, iterations=iterations)
    assert (s >= 0).all()
    torch.testing.assert_close(s.sum(-1), torch.ones(2))
    expected = references.over_batch(references.gwpr, a, "self-attention", iterations)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_gwpr_counts_in_float32_whatever_comes_in() -> None:
    a = random_map(2, 33, 33).bfloat16()
    s = gwpr(a, iterations=4)
    assert s.dtype == torch.float32
    # The only loss is the rounding of the map before the call, so the reference gets the rounded map.
    expected = references.over_batch(references.gwpr, a.double(), "self-attention", 4)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=2e-5, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gwpr(a, iterations=4), s)


def test_gwpr_takes_any_leading_shape() -> None:
    a = random_map(2, 3, 5, 5)
    s = gwpr(a)
    assert s.shape == (2, 3, 5)
    torch.testing.assert_close(s[1, 2], gwpr(a[1, 2]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(2, 12), sharpness=st.floats(0.1, 2.0), seed=st.integers(0, 1000))
def test_self_attention_gwpr_converges_to_the_stationary_distribution(n: int, sharpness: float, seed: int) -> None:
    a = random_map(1, n, n, sharpness=sharpness, seed=seed)
    values, vectors = torch.linalg.eig(a[0].mT)
    stationary = vectors[:, values.abs().argmax()].real
    stationary = stationary / stationary.sum()
    # 500 iterations: the slowest of these maps shrinks its error by 0.97 each, to 1e-6.
    assert values.abs().sort().values[-2] < 0.97
    torch.testing.assert_close(gwpr(a, iterations=500)[0], stationary, check_dtype=False, rtol=1e-4, atol=1e-5)


def test_a_doubly_stochastic_map_ranks_all_tokens_equal_and_a_hub_first() -> None:
    shift = torch.eye(5).roll(1, 0)[None]
    torch.testing.assert_close(gwpr(shift), torch.full((1, 5), 0.2))
    hub = torch.full((1, 5, 5), 0.1)
    hub[..., 3] = 0.6
    assert gwpr(hub).argmax().item() == 3


def test_nothing_becomes_equal_shares() -> None:
    torch.testing.assert_close(
        normalise(torch.tensor([[0.0, 0.0], [1.0, 3.0]])), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    )


def test_self_attention_returns_the_keys_importance_and_refuses_cross_attention() -> None:
    s_k = torch.rand(2, 5)
    assert self_attention(random_map(2, 5, 5), s_k) is s_k
    with pytest.raises(ValueError, match=r"atedm\.lab\.ablation\.mappings"):  # it names what to use instead
        self_attention(random_map(2, 5, 4), torch.rand(2, 4))


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations"):
        gwpr(random_map(1, 3, 3), iterations=0)


def test_gwpr_gradients_match_finite_differences() -> None:
    a = random_map(2, 4, 4)
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    expected = references.finite_difference(
        lambda x: (references.over_batch(references.gwpr, x, "self-attention", 3) * weights).sum(), a, step=1e-6
    )
    assert expected.abs().max() > 0.01
    a32 = a.float().requires_grad_()
    (gradient,) = torch.autograd.grad((gwpr(a32, iterations=3) * weights).sum(), a32)
    torch.testing.assert_close(gradient, expected, check_dtype=False, rtol=1e-3, atol=1e-4)


# --- all heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", SIZES)
def test_rank_matches_the_formula(tokens: int) -> None:
    q, k = queries_and_keys(2, 3, tokens, tokens, 4)
    ranked = rank_by_attention(q, k, 0.5, iterations=2)
    assert ranked.importance.dtype == torch.float32
    expected = references.over_batch(references.importance, q, k, 0.5, "self-attention", "rms", 2)
    torch.testing.assert_close(ranked.importance, expected, check_dtype=False, rtol=1e-4, atol=1e-6)
    assert torch.equal(ranked.attention_map, mean_attention_map(q, k, 0.5))


def test_rank_by_default_is_three_iterations_of_self_attention_per_head() -> None:
    q, k = queries_and_keys(2, 3, 6, 6, 4)
    expected = references.over_batch(references.importance, q, k, 0.5, "self-attention", "rms", 3)
    torch.testing.assert_close(rank_by_attention(q, k, 0.5).importance, expected, check_dtype=False)


def test_rank_of_bfloat16_is_near_that_of_float32() -> None:
    q, k = queries_and_keys(2, 4, 64, 64, 32)
    exact = rank_by_attention(q, k, 0.125).importance
    rough = rank_by_attention(q.bfloat16(), k.bfloat16(), 0.125).importance
    assert rough.dtype == torch.float32
    # q, k and the logits, up to 7, are rounded to 8 bits: a logit is off by some 0.02, and so, relatively, is A.
    # Importance averages 64 such entries, of either sign, in each of 4 heads, which leaves a few thousandths.
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0)


def test_rank_holds_one_map_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = watch_maps(monkeypatch, module)
    with torch.no_grad():
        rank_by_attention(*queries_and_keys(2, 3, 6, 6, 4), 0.5)
    assert freed == [0, 1, 2]


def test_rank_gradients_match_finite_differences() -> None:
    q, k = queries_and_keys(1, 2, 3, 3, 2)
    weights = torch.randn(1, 3, generator=torch.Generator().manual_seed(2))
    expected = references.finite_difference(
        lambda x: (
            references.over_batch(references.importance, x, k.double(), 0.5, "self-attention", "rms", 3) * weights
        ).sum(),
        q.double(),
    )
    assert expected.abs().max() > 0.01
    q.requires_grad_()
    loss = (rank_by_attention(q, k, 0.5).importance * weights).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected, check_dtype=False, rtol=1e-3, atol=1e-5)


def test_root_mean_square_has_a_gradient_at_zero() -> None:
    s = torch.tensor([[3.0, 0.0], [4.0, 0.0]], requires_grad=True)
    fused = root_mean_square(s)
    torch.testing.assert_close(fused, torch.tensor([12.5**0.5, 0.0]))
    (gradient,) = torch.autograd.grad(fused.sum(), s)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.0], [0.8, 0.0]]) / 2**0.5)


def test_rank_compiles_without_graph_break_and_never_waits_for_the_device() -> None:
    q, k = queries_and_keys(2, 3, 6, 6, 4)

    def rank(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rank_by_attention(q, k, 0.5, iterations=2)

    torch._dynamo.reset()
    compiled = torch.compile(rank, fullgraph=True, backend="eager")(q, k)
    for got, expected in zip(compiled, rank(q, k), strict=True):
        torch.testing.assert_close(got, expected)
    # A meta tensor has no values, so whatever asks for one raises.
    assert rank(q.to("meta"), k.to("meta"))[0].shape == (2, 6)
