import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from atedm.method.keep import gather_tokens, keep_count, keep_most_important
from atedm.method.matching import dropped_tokens


@pytest.mark.parametrize(
    ("tokens", "pruning_rate", "kept"),
    [
        (4096, 0.63, 1516),
        (1024, 0.63, 379),
        (100, 0.29, 71),  # 0.29 * 100 is a hair below 29 in floating point
        (10, 0.7, 3),
        (7, 0.0, 7),
        (1, 0.99, 1),
        (5, math.nextafter(1.0, 0.0), 1),
    ],
)
def test_keep_count_by_hand(tokens: int, pruning_rate: float, kept: int) -> None:
    assert keep_count(tokens, pruning_rate) == kept


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 65536), permille=st.integers(0, 999))
def test_keep_count_is_exact_for_decimal_rates(tokens: int, permille: int) -> None:
    assert keep_count(tokens, permille / 1000) == tokens - math.floor(Fraction(permille, 1000) * tokens)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 65536), pruning_rate=st.floats(0, 1, exclude_max=True))
def test_keep_count_is_in_range(tokens: int, pruning_rate: float) -> None:
    assert 1 <= keep_count(tokens, pruning_rate) <= tokens


@pytest.mark.parametrize("pruning_rate", [-0.01, 1.0, 1.5, math.nan, math.inf])
def test_keep_count_refuses_rates_outside_the_range(pruning_rate: float) -> None:
    with pytest.raises(ValueError, match="pruning_rate"):
        keep_count(10, pruning_rate)


def test_keep_count_refuses_no_tokens() -> None:
    with pytest.raises(ValueError, match="tokens"):
        keep_count(0, 0.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 20), levels=st.sampled_from([1, 3, 1000]))
def test_keep_most_important_matches_a_sort(data: st.DataObject, batch: int, tokens: int, levels: int) -> None:
    count = data.draw(st.integers(1, tokens))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, levels - 1), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch)
    )
    importance = torch.tensor(rows, dtype=torch.float32) / levels  # few levels, many ties
    keep = keep_most_important(importance, count)
    assert keep.dtype == torch.int64
    assert torch.equal(keep, references.over_batch(references.keep_most_important, importance, count))


@pytest.mark.parametrize("tokens", [5, 64, 4096])
def test_of_equal_tokens_the_first_are_kept(tokens: int) -> None:
    importance = torch.zeros(2, tokens)
    importance[1, -1] = 1.0
    keep = keep_most_important(importance, 3)
    assert keep.tolist() == [[0, 1, 2], [0, 1, tokens - 1]]


@pytest.mark.parametrize("count", [0, -1, 5])
def test_an_impossible_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count"):
        keep_most_important(torch.zeros(1, 4), count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "kept", "channels"), [(1, 1, 1, 1), (2, 7, 3, 5), (3, 5, 5, 2)])
def test_gather_tokens_matches_a_loop(batch: int, tokens: int, kept: int, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, channels, generator=generator).to(dtype)
    index = torch.randint(tokens, (batch, kept), generator=generator)
    out = gather_tokens(x, index)
    assert out.dtype == dtype
    assert torch.equal(out.double(), references.over_batch(references.gather_tokens, x, index))


def test_gather_tokens_gradient() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index = torch.tensor([[0, 2, 2], [4, 1, 3]])  # one token twice
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), (x,))
    (gradient,) = torch.autograd.grad(gather_tokens(x, index).sum(), x)
    assert gradient[:, :, 0].tolist() == [[1, 0, 2, 0, 0], [0, 1, 0, 1, 1]]


def test_pruning_compiles_without_graph_break_and_never_waits_for_the_device() -> None:
    def prune(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        return gather_tokens(x, keep_most_important(importance, keep_count(x.shape[1], 0.63)))

    generator = torch.Generator().manual_seed(0)
    x, importance = torch.randn(2, 9, 4, generator=generator), torch.rand(2, 9, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(prune, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, importance), prune(x, importance))
    # A meta tensor has no values, so whatever asks for one raises.
    assert prune(x.to("meta"), importance.to("meta")).shape == (2, 4, 4)


class KeptAndDropped(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep = keep_most_important(importance, self.count)
        return keep, dropped_tokens(keep, importance.shape[1])


@pytest.mark.parametrize(("tokens", "count"), [(7, 3), (30, 11), (5, 5), (4, 1)])
def test_an_exported_graph_keeps_what_is_kept_elsewhere(tokens: int, count: int) -> None:
    module = KeptAndDropped(count)
    graph = torch.export.export(module, (torch.rand(2, tokens),), strict=False).module()
    values = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, math.inf, -math.inf]) | st.floats(0, 1, width=32)
    row = st.lists(values | st.just(math.nan), min_size=tokens, max_size=tokens)

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(rows=st.lists(row, min_size=2, max_size=2))
    def compare(rows: list[list[float]]) -> None:
        importance = torch.tensor(rows)
        # In a graph what is not a number counts as infinity, elsewhere as more.
        counted = torch.where(importance.isnan(), torch.inf, importance)
        for found, expected in zip(graph(importance), module(counted), strict=True):
            assert torch.equal(found, expected)

    compare()
