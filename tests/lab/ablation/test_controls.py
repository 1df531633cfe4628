"""Rankings that the methods are held against: by attention received, by chance, and by place."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.lab.ablation.controls import (
    attention_received,
    cells,
    facility_location,
    important_of_cells,
    uniform_random,
)
from atedm.method.gwpr import gwpr
from atedm.method.keep import keep_most_important

SHAPES = [(1, 1), (5, 5), (7, 3), (3, 8)]  # queries, keys
FAST = settings(max_examples=60, deadline=None, derandomize=True)


def random_map(*shape: int, sharpness: float = 2.0, seed: int = 0) -> Tensor:
    logits = sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(-1)


def kept(importance: Tensor, count: int) -> list[int]:
    return keep_most_important(importance.reshape(1, -1), count)[0].tolist()


# --- attention received, and chance -----------------------------------------------------------------------------------


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


# --- places and features ----------------------------------------------------------------------------------------------


@FAST
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)), step=st.integers(0, 999))
def test_cells_give_every_token_a_number_of_its_own(size: tuple[int, int], step: int) -> None:
    importance = cells(size, step=step)
    assert importance.shape == (size[0] * size[1],)
    assert importance.dtype == torch.float32
    assert importance.unique().numel() == importance.numel()
    assert importance.min() > 0
    assert importance.max() <= 1
    assert torch.equal(importance, cells(size, step=torch.tensor(step)))  # the same of a tensor


def test_a_quarter_of_the_cells_order_is_one_token_of_each_cell_and_four_steps_take_all() -> None:
    size, seen = (8, 12), set()
    for step in range(4):
        chosen = kept(cells(size, step=step), 24)
        assert len({(i // 12 // 2, i % 12 // 2) for i in chosen}) == 24
        seen |= set(chosen)
    assert seen == set(range(96))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (2, 1)])
def test_the_most_important_token_of_each_cell_comes_first(size: tuple[int, int]) -> None:
    importance = torch.rand(2, size[0] * size[1], generator=torch.Generator().manual_seed(1))
    order = important_of_cells(importance, size)
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    for scores, values in zip(order, importance, strict=True):
        best: dict[tuple[int, int], int] = {}
        for i, value in enumerate(values.tolist()):
            cell = (i // size[1] // 2, i % size[1] // 2)
            if cell not in best or value > values[best[cell]]:
                best[cell] = i
        assert kept(scores, rows * columns) == sorted(best.values())


@FAST
@given(tokens=st.integers(2, 12), count=st.integers(1, 12), seed=st.integers(0, 99))
def test_facility_location_is_greedy(tokens: int, count: int, seed: int) -> None:
    count = min(count, tokens)
    x = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    cosine = unit @ unit.T
    chosen: list[int] = []
    for _ in range(count):

        def total(candidate: int, chosen: list[int] = chosen) -> float:
            return float(cosine[[*chosen, candidate]].amax(0).clamp_min(-1).sum())

        chosen.append(max((i for i in range(tokens) if i not in chosen), key=total))
    importance = facility_location(x, count)[0]
    assert (importance > 0).sum() == count
    ours = importance.argsort(descending=True)[:count].tolist()
    assert float(cosine[ours].amax(0).sum()) == pytest.approx(float(cosine[chosen].amax(0).sum()), abs=1e-4)
