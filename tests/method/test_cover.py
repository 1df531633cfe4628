"""Kept sets that cover: how evenly, for how many, and how they move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atedm.method.cover import lattice, representative
from atedm.method.keep import keep_count, keep_most_important

SIDES = st.tuples(st.integers(1, 20), st.integers(1, 20))
FAST = settings(max_examples=60, deadline=None, derandomize=True)


def kept(importance: Tensor, count: int) -> list[int]:
    return keep_most_important(importance.reshape(1, -1), count)[0].tolist()


def gaps(importance: Tensor, size: tuple[int, int], count: int) -> tuple[float, float]:
    """Mean and largest distance of a token to the nearest kept one."""
    places = np.array([(i // size[1], i % size[1]) for i in kept(importance, count)])
    grid = np.stack(np.meshgrid(range(size[0]), range(size[1]), indexing="ij"), -1).reshape(-1, 1, 2)
    apart = np.sqrt(((grid - places) ** 2).sum(-1)).min(1)
    return float(apart.mean()), float(apart.max())


@FAST
@given(size=SIDES, step=st.integers(0, 999))
def test_the_lattice_gives_every_token_a_number_of_its_own(size: tuple[int, int], step: int) -> None:
    importance = lattice(size, step=step)
    assert importance.shape == (size[0] * size[1],)
    assert importance.dtype == torch.float32
    assert importance.unique().numel() == importance.numel()
    assert importance.min() > 0
    assert importance.max() <= 1
    assert torch.equal(importance, lattice(size, step=torch.tensor(step)))  # the same of a tensor


@FAST
@given(size=SIDES, step=st.integers(0, 999))
def test_the_lattice_is_the_sequence_it_says(size: tuple[int, int], step: int) -> None:
    p = 1.324717957244746
    for token, value in enumerate(lattice(size, step=step).tolist()):
        y, x = divmod(token, size[1])
        exact = (x / p + y / p**2 + (5**0.5 - 1) / 2 * step) % 1
        apart = abs(1 - value - exact)
        assert min(apart, 1 - apart) < 1e-5


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (7, 40)])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.63, 0.8, 0.95])
@pytest.mark.parametrize("step", [0, 7])
def test_the_lattice_leaves_smaller_gaps_than_chance(size: tuple[int, int], rate: float, step: int) -> None:
    count = keep_count(size[0] * size[1], rate)
    generator = torch.Generator().manual_seed(0)
    by_chance = [gaps(torch.rand(size[0] * size[1], generator=generator), size, count) for _ in range(8)]
    mean, largest = gaps(lattice(size, step=step), size, count)
    assert mean <= min(mean for mean, _ in by_chance)
    assert largest <= sorted(largest for _, largest in by_chance)[4]


def test_the_lattice_moves_and_comes_to_every_token() -> None:
    seen: set[int] = set()
    for step in range(20):
        chosen = set(kept(lattice((16, 16), step=step), 95))
        assert chosen != seen
        seen |= chosen
    assert seen == set(range(256))


@FAST
@given(
    tokens=st.integers(1, 14),
    count=st.integers(1, 14),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_representative_takes_the_cover_and_then_what_is_least_like_it(
    tokens: int, count: int, share: float, seed: int
) -> None:
    count = min(count, tokens)
    generator = torch.Generator().manual_seed(seed)
    x, cover = torch.randn(2, tokens, 3, generator=generator), torch.rand(tokens, generator=generator)
    order = representative(x, cover, count, share)
    base = kept(cover, max(1, round(share * count)))
    for image, importance in zip(x.double(), order, strict=True):
        apart = torch.cdist(image, image[base]).amin(1)
        others = sorted((i for i in range(tokens) if i not in base), key=lambda i: -float(apart[i]))
        expected = sorted(base + others[: max(0, count - len(base))])
        assert kept(importance, max(count, len(base))) == expected


def test_representative_measures_what_is_unlike_as_a_share_of_the_worst() -> None:
    tokens = torch.tensor([[[0.0], [1.0], [3.0], [2.0]]])
    order = representative(tokens, torch.tensor([0.9, 0.1, 0.2, 0.3]), 2, 0.5)  # the cover is the first token
    torch.testing.assert_close(order, torch.tensor([[2.0, 1 / 9, 1.0, 4 / 9]]))


def test_equal_tokens_are_kept_in_their_order_after_the_cover() -> None:
    order = representative(torch.ones(2, 6, 3), torch.arange(6.0), 4, 0.5)
    assert keep_most_important(order, 4).tolist() == [[0, 1, 4, 5]] * 2


def test_covers_compile_without_graph_break_and_never_wait_for_the_device() -> None:
    def cover(tokens: Tensor, step: Tensor) -> Tensor:
        spread = lattice((3, 5), step=step, device=tokens.device)
        return representative(tokens, spread, 6, 0.4)

    tokens, step = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(7)
    torch._dynamo.reset()
    compiled = torch.compile(cover, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, step), cover(tokens, step))
    assert cover(tokens.to("meta"), step.to("meta")).shape == (2, 15)
