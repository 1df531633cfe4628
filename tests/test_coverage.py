"""Kept sets that cover: how evenly, for how many, and how they move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atedm.coverage import cells, facility_location, important_of_cells, lattice, representative
from atedm.pruning import keep_count, keep_most_important

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
def test_covers_give_every_token_a_number_of_its_own(size: tuple[int, int], step: int) -> None:
    for cover in (lattice, cells):
        importance = cover(size, step=step)
        assert importance.shape == (size[0] * size[1],)
        assert importance.dtype == torch.float32
        assert importance.unique().numel() == importance.numel()
        assert importance.min() > 0
        assert importance.max() <= 1
        assert torch.equal(importance, cover(size, step=torch.tensor(step)))  # the same of a tensor


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (7, 40)])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.63, 0.8, 0.95])
@pytest.mark.parametrize("step", [0, 7])
def test_covers_leave_smaller_gaps_than_chance(size: tuple[int, int], rate: float, step: int) -> None:
    count = keep_count(size[0] * size[1], rate)
    generator = torch.Generator().manual_seed(0)
    by_chance = [gaps(torch.rand(size[0] * size[1], generator=generator), size, count) for _ in range(8)]
    mean, largest = gaps(lattice(size, step=step), size, count)
    assert mean <= min(mean for mean, _ in by_chance)
    assert largest <= sorted(largest for _, largest in by_chance)[4]


def test_a_quarter_of_the_cells_order_is_one_token_of_each_cell_and_four_steps_take_all() -> None:
    size, seen = (8, 12), set()
    for step in range(4):
        chosen = kept(cells(size, step=step), 24)
        assert len({(i // 12 // 2, i % 12 // 2) for i in chosen}) == 24
        seen |= set(chosen)
    assert seen == set(range(96))


def test_the_lattice_moves_and_comes_to_every_token() -> None:
    seen: set[int] = set()
    for step in range(20):
        chosen = set(kept(lattice((16, 16), step=step), 95))
        assert chosen != seen
        seen |= chosen
    assert seen == set(range(256))


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


@FAST
@given(
    tokens=st.integers(1, 14),
    count=st.integers(1, 14),
    share=st.floats(0, 1),
    by=st.sampled_from(["cosine", "euclidean"]),
    seed=st.integers(0, 99),
)
def test_representative_takes_the_cover_and_then_what_is_least_like_it(
    tokens: int, count: int, share: float, by: str, seed: int
) -> None:
    count = min(count, tokens)
    generator = torch.Generator().manual_seed(seed)
    x, cover = torch.randn(2, tokens, 3, generator=generator), torch.rand(tokens, generator=generator)
    order = representative(x, cover, count, share, by)
    base = kept(cover, max(1, round(share * count)))
    for image, importance in zip(x.double(), order, strict=True):
        unit = torch.nn.functional.normalize(image, dim=-1) if by == "cosine" else image
        apart = torch.cdist(unit, unit[base]).amin(1)
        others = sorted((i for i in range(tokens) if i not in base), key=lambda i: -float(apart[i]))
        expected = sorted(base + others[: max(0, count - len(base))])
        assert kept(importance, max(count, len(base))) == expected
