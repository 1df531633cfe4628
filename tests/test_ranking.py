import functools
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm import ranking as module
from atedm.attention_map import attention_maps, mean_attention_map
from atedm.ranking import (
    HEAD_FUSIONS,
    MAPPINGS,
    attention_received,
    entropy,
    gwpr,
    hard_clip,
    power,
    rank_by_attention,
    root_mean_square,
    self_attention,
    soft_clip,
    uniform_random,
)

CROSS_MAPPINGS = [name for name in MAPPINGS if name != "self-attention"]
SHAPES = [(1, 1), (5, 5), (7, 3), (3, 8)]  # queries, keys
MAPPINGS_AND_SHAPES = [(name, m, n) for name in MAPPINGS for m, n in SHAPES if m == n or name != "self-attention"]


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


@pytest.mark.parametrize("name", CROSS_MAPPINGS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_mapping_matches_the_formula(name: str, m: int, n: int) -> None:
    a, s_k = random_map(2, m, n), random_importance(2, n)
    expected = references.over_batch(references.MAPPINGS[name], a, s_k)
    assert expected.abs().max() > 0
    torch.testing.assert_close(MAPPINGS[name](a, s_k), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CROSS_MAPPINGS)
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


def test_self_attention_returns_the_keys_importance_and_refuses_cross_attention() -> None:
    s_k = random_importance(2, 5)
    assert self_attention(random_map(2, 5, 5), s_k) is s_k
    with pytest.raises(ValueError, match="entropy"):  # it names what to use instead
        self_attention(random_map(2, 5, 4), random_importance(2, 4))


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


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize(("name", "m", "n"), MAPPINGS_AND_SHAPES)
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
    a = random_map(2, m, m if name == "self-attention" else n, sharpness=sharpness, seed=seed).float().double()
    s = gwpr(a, MAPPINGS[name], iterations=iterations)
    assert (s >= 0).all()
    torch.testing.assert_close(s.sum(-1), torch.ones(2))
    expected = references.over_batch(references.gwpr, a, name, iterations)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_gwpr_counts_in_float32_whatever_comes_in() -> None:
    a = random_map(2, 33, 33).bfloat16()
    s = gwpr(a, iterations=4)
    assert s.dtype == torch.float32
    # The only loss is the rounding of the map before the call, so the reference gets the rounded map.
    expected = references.over_batch(references.gwpr, a.double(), "self-attention", 4)
    torch.testing.assert_close(s, expected, check_dtype=False, rtol=2e-5, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for f in MAPPINGS.values():
            within = gwpr(a, f, iterations=4)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(within, gwpr(a, f, iterations=4))


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


def test_a_map_that_the_hard_clip_empties_ranks_all_tokens_equal() -> None:
    a = torch.full((2, 4, 10), 0.1)
    a[1, 2] = 0.0
    a[1, 2, 5] = 1.0  # the second image has one row that passes
    s = gwpr(a.requires_grad_(), hard_clip)
    torch.testing.assert_close(s, torch.tensor([[0.25] * 4, [0.0, 0.0, 1.0, 0.0]]))
    assert torch.autograd.grad(s.square().sum(), a)[0].isfinite().all()


def test_tolerance_stops_once_every_image_has_settled() -> None:
    calls = 0

    def counted(a: Tensor, s_k: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return s_k

    def calls_for(a: Tensor, tolerance: float, iterations: int = 100) -> int:
        nonlocal calls
        calls = 0
        gwpr(a, counted, iterations=iterations, tolerance=tolerance)
        return calls

    settled = torch.full((1, 6, 6), 1 / 6)
    slow = random_map(1, 6, 6).float()
    assert calls_for(settled, 1e-6) == 1
    assert calls_for(slow, 10.0) == 1
    assert calls_for(slow, 0.0, iterations=7) == 7  # the cap
    alone = calls_for(slow, 1e-4)
    assert 2 < alone < 100
    assert calls_for(torch.cat([settled, slow]), 1e-4) == alone  # the slowest decides
    # It stopped at the first step whose change is small enough, and not one later.
    before, after, last = (gwpr(slow, iterations=alone + i) for i in (-2, -1, 0))
    assert (last - after).abs().sum() < 1e-4 <= (after - before).abs().sum()
    assert torch.equal(gwpr(slow, iterations=100, tolerance=1e-4), last)


def test_each_map_of_a_batch_settles_by_itself() -> None:
    maps = torch.cat([torch.full((1, 6, 6), 1 / 6), random_map(3, 6, 6).float(), torch.full((1, 6, 6), torch.nan)])
    together = gwpr(maps, iterations=50, tolerance=1e-2)
    for index in range(4):
        torch.testing.assert_close(gwpr(maps[index], iterations=50, tolerance=1e-2), together[index])
    assert (together[:4] - gwpr(maps[:4], iterations=50)).abs().max() > 1e-4


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations"):
        gwpr(random_map(1, 3, 3), iterations=0)


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


# --- all heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_fusion", HEAD_FUSIONS)
@pytest.mark.parametrize(("mapping", "m", "n"), MAPPINGS_AND_SHAPES)
def test_rank_matches_the_formula(head_fusion: str, mapping: str, m: int, n: int) -> None:
    q, k = queries_and_keys(2, 3, m, n, 4)
    ranked = rank_by_attention(q, k, 0.5, f=MAPPINGS[mapping], head_fusion=head_fusion, iterations=2)
    assert ranked.importance.dtype == torch.float32
    expected = references.over_batch(references.importance, q, k, 0.5, mapping, head_fusion, 2)
    torch.testing.assert_close(ranked.importance, expected, check_dtype=False, rtol=1e-4, atol=1e-6)
    assert torch.equal(ranked.attention_map, mean_attention_map(q, k, 0.5))


def test_head_fusions_differ() -> None:
    q, k = queries_and_keys(1, 4, 8, 8, 3)
    rms, mean = (rank_by_attention(q, k, 0.5, head_fusion=name).importance for name in HEAD_FUSIONS)
    assert not torch.allclose(rms, mean, rtol=0.01)


def test_rank_by_default_is_three_iterations_of_self_attention_per_head() -> None:
    q, k = queries_and_keys(2, 3, 6, 6, 4)
    expected = references.over_batch(references.importance, q, k, 0.5, "self-attention", "rms", 3)
    torch.testing.assert_close(rank_by_attention(q, k, 0.5).importance, expected, check_dtype=False)


@pytest.mark.parametrize("head_fusion", HEAD_FUSIONS)
def test_rank_passes_the_tolerance_on(head_fusion: str) -> None:
    q, k = queries_and_keys(1, 1, 6, 6, 4)
    one = rank_by_attention(q, k, 0.5, head_fusion=head_fusion, iterations=50, tolerance=10.0).importance
    assert torch.equal(one, rank_by_attention(q, k, 0.5, head_fusion=head_fusion, iterations=1).importance)


def test_rank_of_bfloat16_is_near_that_of_float32() -> None:
    q, k = queries_and_keys(2, 4, 64, 64, 32)
    exact = rank_by_attention(q, k, 0.125).importance
    rough = rank_by_attention(q.bfloat16(), k.bfloat16(), 0.125).importance
    assert rough.dtype == torch.float32
    # q, k and the logits, up to 7, are rounded to 8 bits: a logit is off by some 0.02, and so, relatively, is A.
    # Importance averages 64 such entries, of either sign, in each of 4 heads, which leaves a few thousandths.
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0)


def test_rank_holds_one_map_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def watched(q: Tensor, k: Tensor, scale: float) -> Iterator[Tensor]:
        nonlocal seen
        for q_head, k_head in zip(q.unbind(1), k.unbind(1), strict=True):
            a = next(attention_maps(q_head[:, None], k_head[:, None], scale))
            reference = weakref.ref(a)
            yield a
            del a
            assert reference() is None, "the previous map is alive while the next one is made"
            seen += 1

    monkeypatch.setattr(module, "maps_in_turn", watched)
    with torch.no_grad():
        rank_by_attention(*queries_and_keys(2, 3, 6, 6, 4), 0.5)
    assert seen == 3


@pytest.mark.parametrize("head_fusion", HEAD_FUSIONS)
def test_rank_gradients_match_finite_differences(head_fusion: str) -> None:
    q, k = queries_and_keys(1, 2, 3, 3, 2)
    weights = torch.randn(1, 3, generator=torch.Generator().manual_seed(2))
    expected = references.finite_difference(
        lambda x: (
            references.over_batch(references.importance, x, k.double(), 0.5, "self-attention", head_fusion, 3) * weights
        ).sum(),
        q.double(),
    )
    assert expected.abs().max() > 0.01
    q.requires_grad_()
    loss = (rank_by_attention(q, k, 0.5, head_fusion=head_fusion).importance * weights).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected, check_dtype=False, rtol=1e-3, atol=1e-5)


def test_rank_gradient_is_finite_where_no_head_gives_importance() -> None:
    q, k = queries_and_keys(1, 1, 4, 4, 2)
    q[0, 0, 1] = 0.0  # equal attention of 0.25 to four keys, below the threshold
    f = functools.partial(hard_clip, eta=0.3)
    s = rank_by_attention(q.requires_grad_(), k, 1.0, f=f).importance
    assert s[0, 1].item() < 1e-15
    assert torch.autograd.grad(s.sum(), q)[0].isfinite().all()


def test_root_mean_square_has_a_gradient_at_zero() -> None:
    s = torch.tensor([[3.0, 0.0], [4.0, 0.0]], requires_grad=True)
    fused = root_mean_square(s)
    torch.testing.assert_close(fused, torch.tensor([12.5**0.5, 0.0]))
    (gradient,) = torch.autograd.grad(fused.sum(), s)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.0], [0.8, 0.0]]) / 2**0.5)


def test_an_unknown_head_fusion_is_refused_with_the_known_ones() -> None:
    q, k = queries_and_keys(1, 1, 3, 3, 2)
    with pytest.raises(ValueError, match="mean-map"):
        rank_by_attention(q, k, 1.0, head_fusion="max")


@pytest.mark.parametrize("head_fusion", HEAD_FUSIONS)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_rank_compiles_without_graph_break(head_fusion: str, mapping: str) -> None:
    q, k = queries_and_keys(2, 3, 6, 6, 4)

    def rank(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rank_by_attention(q, k, 0.5, f=MAPPINGS[mapping], head_fusion=head_fusion, iterations=2)

    torch._dynamo.reset()
    compiled = torch.compile(rank, fullgraph=True, backend="eager")(q, k)
    for got, expected in zip(compiled, rank(q, k), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_fixed_count_never_waits_for_the_device(mapping: str) -> None:
    # A meta tensor has no values, so whatever asks for one raises.
    q = torch.empty(2, 3, 6, 4, device="meta")
    for head_fusion in HEAD_FUSIONS:
        ranked = rank_by_attention(q, q, 0.5, f=MAPPINGS[mapping], head_fusion=head_fusion)
        assert ranked.importance.shape == (2, 6)
    with pytest.raises((RuntimeError, NotImplementedError)):
        rank_by_attention(q, q, 0.5, f=MAPPINGS[mapping], tolerance=1e-3)


# --- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_attention_received_is_the_column_mean(m: int, n: int) -> None:
    a = random_map(2, m, n)
    received = attention_received(a)
    assert received.dtype == torch.float32
    expected = [[sum(a[b, i, j].item() for i in range(m)) / m for j in range(n)] for b in range(2)]
    torch.testing.assert_close(received, torch.tensor(expected))
    if m == n:
        torch.testing.assert_close(received, gwpr(a, iterations=1))


def test_attention_received_sums_in_float32() -> None:
    a = random_map(1, 512, 4).bfloat16()
    torch.testing.assert_close(attention_received(a), a.double().mean(-2).float(), rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    seed=st.integers(-(2**63), 2**64),
    step=st.integers(0, 2**31),
)
def test_uniform_random_is_the_hash_it_says(batch: int, tokens: int, seed: int, step: int) -> None:
    draws = uniform_random(batch, tokens, seed=seed, step=step)
    assert draws.dtype == torch.float32
    expected = torch.tensor(references.uniform_random(batch, tokens, seed, step), dtype=torch.float32)
    assert torch.equal(draws, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_uniform_random_is_equal_on_every_device() -> None:
    draws = uniform_random(2, 4096, seed=7, step=3, device="cuda")
    assert torch.equal(draws.cpu(), uniform_random(2, 4096, seed=7, step=3))


def test_uniform_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first = uniform_random(2, 16, seed=0, step=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(uniform_random(2, 16, seed=0, step=0), first)


@functools.cache
def draws() -> Tensor:
    """(8 seeds, 8 steps, 2 images, 4096 tokens)."""
    return torch.stack(
        [torch.stack([uniform_random(2, 4096, seed=seed, step=step) for step in range(8)]) for seed in range(8)]
    ).double()


def test_uniform_random_has_the_moments_and_histogram_of_a_uniform() -> None:
    x = draws()
    n = x.numel()
    assert x.min() >= 0
    assert x.max() < 1
    # Five standard deviations of each estimate: that of a uniform number is sqrt(1/12), that of its squared
    # deviation from the mean sqrt(1/180).
    assert abs(x.mean().item() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(x.var().item() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    counts = torch.histc(x, 256, 0, 1)
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5
    # The lowest bits are as even as the highest.
    odd = (x * 2**24 % 2).mean().item()
    assert abs(odd - 1 / 2) < 5 * (1 / 4 / n) ** 0.5


@pytest.mark.parametrize(("name", "axis"), [("seed", 0), ("step", 1), ("image", 2), ("token", 3)])
def test_uniform_random_has_uncorrelated_neighbours(name: str, axis: int) -> None:
    x = draws()
    here = x.narrow(axis, 0, x.shape[axis] - 1).flatten()
    following = x.narrow(axis, 1, x.shape[axis] - 1).flatten()
    correlation = torch.corrcoef(torch.stack([here, following]))[0, 1].item()
    assert abs(correlation) < 5 / here.numel() ** 0.5, f"neighbours by {name}"


def test_uniform_random_keeps_every_token_equally_often() -> None:
    runs, tokens, kept = 500, 64, 24
    counts = torch.zeros(2, tokens)
    for step in range(runs):
        top = uniform_random(2, tokens, seed=5, step=step).topk(kept).indices
        counts.scatter_add_(1, top, torch.ones(2, kept))
    share = kept / tokens
    z = (counts - runs * share) / (runs * share * (1 - share)) ** 0.5
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean() < 1.5  # neither clumped nor suspiciously even


def test_uniform_random_compiles_without_graph_break_or_recompilation_per_step() -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(uniform_random, fullgraph=True, backend=counting)
    for step in range(6):
        assert torch.equal(compiled(2, 9, seed=3, step=step), uniform_random(2, 9, seed=3, step=step))
    assert graphs <= 3  # 0 and 1 may be special, then the step becomes an input
