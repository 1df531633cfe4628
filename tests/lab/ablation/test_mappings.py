"""The mappings of cross-attention: their formulas, and G-WPR with them, against loops in float64."""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.lab.ablation.mappings import MAPPINGS, entropy, hard_clip, power, soft_clip
from atedm.method.attention_map import mean_attention_map
from atedm.method.gwpr import gwpr, rank_by_attention

SHAPES = [(1, 1), (5, 5), (7, 3), (3, 8)]  # queries, keys


def random_map(*shape: int, sharpness: float = 2.0, seed: int = 0) -> Tensor:
    logits = sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(-1)


def random_importance(*shape: int, seed: int = 1) -> Tensor:
    s = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return s / s.sum(-1, keepdim=True)


def queries_and_keys(batch: int, heads: int, m: int, n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Twice the usual spread, so that some entries pass the hard clip; more, and rows get so sharp that their entropy
    # is lost in the rounding of the map.
    return (
        2 * torch.randn(batch, heads, m, width, generator=generator),
        torch.randn(batch, heads, n, width, generator=generator),
    )


# --- mappings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_mapping_matches_the_formula(name: str, m: int, n: int) -> None:
    a, s_k = random_map(2, m, n), random_importance(2, n)
    expected = references.over_batch(references.MAPPINGS[name], a, s_k)
    assert expected.abs().max() > 0
    torch.testing.assert_close(MAPPINGS[name](a, s_k), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAPPINGS)
def test_mapping_takes_any_leading_shape(name: str) -> None:
    a, s_k = random_map(2, 3, 4, 5), random_importance(2, 3, 5)
    together = MAPPINGS[name](a, s_k)
    assert together.shape == (2, 3, 4)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(together[b, h], MAPPINGS[name](a[b, h], s_k[b, h]))


def test_parameters_of_the_mappings_match_the_formula() -> None:
    a, s_k = random_map(2, 4, 6), random_importance(2, 6)
    cases: list[tuple[Callable[..., Tensor], Callable[..., list[float]], dict[str, float]]] = [
        (hard_clip, references.hard_clip, {"eta": 0.4}),
        (soft_clip, references.soft_clip, {"eta": 0.7}),
        (power, references.power, {"alpha": 2.5, "beta": 9.0}),
    ]
    for mapping, reference, options in cases:
        expected = references.over_batch(reference, a, s_k, **options)
        torch.testing.assert_close(mapping(a, s_k, **options), expected)
        assert not torch.allclose(mapping(a, s_k), expected), "the parameter has no effect"


def test_hard_clip_lets_the_threshold_itself_pass() -> None:
    a = torch.tensor([[0.2, 0.8], [0.19, 0.81]])
    torch.testing.assert_close(hard_clip(a, torch.tensor([0.25, 0.75])), torch.tensor([1.0, 0.75]))


def test_entropy_of_a_sharp_row_is_finite_and_largest() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [1 / 3, 1 / 3, 1 / 3]], requires_grad=True)
    s_q = entropy(a, torch.tensor([0.5, 0.3, 0.2]))
    assert s_q.isfinite().all()
    assert s_q.argsort(descending=True).tolist() == [0, 1, 2]
    assert torch.autograd.grad(s_q.sum(), a)[0].isfinite().all()


def test_power_of_zero() -> None:
    # A key nobody attends to has importance 0: 0 ^ 0 is 1, and 0 to a positive power is next to nothing.
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    s_k = torch.tensor([0.0, 1.0], requires_grad=True)
    s_q = power(a, s_k)
    torch.testing.assert_close(s_q, torch.tensor([2.0, 1.0]))
    for gradient in torch.autograd.grad(s_q.sum(), (a, s_k)):
        assert gradient.isfinite().all()


def test_power_does_not_overflow() -> None:
    a = torch.eye(4).expand(2, 4, 4)
    s_k = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 4)
    huge = functools.partial(power, alpha=1000.0)
    assert huge(a, s_k).isfinite().all()
    torch.testing.assert_close(gwpr(a, huge).sum(-1), torch.ones(2))


@pytest.mark.parametrize("name", MAPPINGS)
def test_mapping_gradients(name: str) -> None:
    a = random_map(2, 4, 4).requires_grad_()
    s_k = random_importance(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(MAPPINGS[name], (a, s_k))


# --- G-WPR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gwpr_matches_algorithm_1(name: str, m: int, n: int, iterations: int) -> None:
    a = random_map(3, m, n)
    s = gwpr(a, MAPPINGS[name], iterations=iterations)
    assert s.dtype == torch.float32
    expected = references.over_batch(references.gwpr, a, name, iterations)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=2e-5, atol=1e-7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(MAPPINGS)),
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    iterations=st.integers(1, 6),
    sharpness=st.floats(0.1, 5.0),
    seed=st.integers(0, 1000),
)
def test_gwpr_on_any_map(name: str, m: int, n: int, iterations: int, sharpness: float, seed: int) -> None:
    # The reference gets the map as float32 rounds it: the entropy of a sharp row hangs on the last digits.
    a = random_map(2, m, n, sharpness=sharpness, seed=seed).float().double()
    s = gwpr(a, MAPPINGS[name], iterations=iterations)
    assert (s >= 0).all()
    torch.testing.assert_close(s.sum(-1), torch.ones(2))
    expected = references.over_batch(references.gwpr, a, name, iterations)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MAPPINGS)
def test_autocast_changes_nothing(name: str) -> None:
    a = random_map(2, 33, 33).bfloat16()
    expected = gwpr(a, MAPPINGS[name], iterations=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gwpr(a, MAPPINGS[name], iterations=4), expected)


def test_a_map_that_the_hard_clip_empties_ranks_all_tokens_equal() -> None:
    a = torch.full((2, 4, 10), 0.1)
    a[1, 2] = 0.0
    a[1, 2, 5] = 1.0  # the second image has one row that passes
    s = gwpr(a.requires_grad_(), hard_clip)
    torch.testing.assert_close(s, torch.tensor([[0.25] * 4, [0.0, 0.0, 1.0, 0.0]]))
    assert torch.autograd.grad(s.square().sum(), a)[0].isfinite().all()


@pytest.mark.parametrize("name", MAPPINGS)
def test_gwpr_gradients_match_finite_differences(name: str) -> None:
    a = random_map(2, 4, 4)
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    expected = references.finite_difference(
        lambda x: (references.over_batch(references.gwpr, x, name, 3) * weights).sum(), a, step=1e-6
    )
    assert expected.abs().max() > 0.01
    a32 = a.float().requires_grad_()
    (gradient,) = torch.autograd.grad((gwpr(a32, MAPPINGS[name], iterations=3) * weights).sum(), a32)
    torch.testing.assert_close(gradient, expected, check_dtype=False, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rank_matches_the_formula(name: str, m: int, n: int) -> None:
    q, k = queries_and_keys(2, 3, m, n, 4)
    ranked = rank_by_attention(q, k, 0.5, f=MAPPINGS[name], iterations=2)
    expected = references.over_batch(references.importance, q, k, 0.5, name, "rms", 2)
    torch.testing.assert_close(ranked.importance, expected, check_dtype=False, rtol=1e-4, atol=1e-6)
    assert torch.equal(ranked.attention_map, mean_attention_map(q, k, 0.5))


def test_rank_gradient_is_finite_where_no_head_gives_importance() -> None:
    q, k = queries_and_keys(1, 1, 4, 4, 2)
    q[0, 0, 1] = 0.0  # equal attention of 0.25 to four keys, below the threshold
    f = functools.partial(hard_clip, eta=0.3)
    s = rank_by_attention(q.requires_grad_(), k, 1.0, f=f).importance
    assert s[0, 1].item() < 1e-15
    assert torch.autograd.grad(s.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("name", MAPPINGS)
def test_rank_compiles_without_graph_break_and_never_waits_for_the_device(name: str) -> None:
    q, k = queries_and_keys(2, 3, 6, 4, 4)

    def rank(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rank_by_attention(q, k, 0.5, f=MAPPINGS[name], iterations=2)

    torch._dynamo.reset()
    compiled = torch.compile(rank, fullgraph=True, backend="eager")(q, k)
    for got, expected in zip(compiled, rank(q, k), strict=True):
        torch.testing.assert_close(got, expected)
    # A meta tensor has no values, so whatever asks for one raises.
    assert rank(q.to("meta"), k.to("meta"))[0].shape == (2, 6)
