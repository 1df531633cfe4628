import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from atedm.method import attention_map as module
from atedm.method.attention_map import attention_maps, maps_in_turn, mean_attention_map, without_autocast
from one_map import watch_maps

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 5, 4), (2, 2, 7, 3, 5), (3, 1, 4, 9, 2)]  # batch, heads, queries, keys, width


def queries_and_keys(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    batch, heads, m, n, width = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, m, width, generator=generator)
    k = torch.randn(batch, heads, n, width, generator=generator)
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_match_the_formula(shape: tuple[int, ...]) -> None:
    q, k = queries_and_keys(shape)
    scale = shape[-1] ** -0.5
    maps = torch.stack(list(attention_maps(q, k, scale)), dim=1)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(
        maps, references.over_batch(references.attention_maps, q, k, scale), check_dtype=False, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(maps.sum(-1), torch.ones(shape[:3]))


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_map_matches_the_formula(shape: tuple[int, ...]) -> None:
    q, k = queries_and_keys(shape)
    scale = shape[-1] ** -0.5
    mean = mean_attention_map(q, k, scale)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(
        mean, references.over_batch(references.mean_attention_map, q, k, scale), check_dtype=False, rtol=1e-5, atol=1e-6
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 9)] * 3),
    scale=st.floats(0.01, 2.0),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_scale(shape: tuple[int, ...], scale: float, seed: int) -> None:
    q, k = queries_and_keys(shape, seed=seed)
    mean = mean_attention_map(q, k, scale)
    expected = references.over_batch(references.mean_attention_map, q, k, scale)
    # The logits reach some 40 here, and their float32 rounding, 40 * 2^-24, is the relative error of the map.
    torch.testing.assert_close(mean, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_product(dtype: torch.dtype) -> None:
    q, k = queries_and_keys((2, 3, 7, 7, 16), dtype)
    mean = mean_attention_map(q, k, 0.25)
    assert mean.dtype == torch.float32
    # The scale is a power of two, so only the logits are rounded, each by half an ulp; a softmax turns an absolute
    # error d of the logits into a relative one of at most exp(2 d) - 1.
    largest_logit = (0.25 * q.double() @ k.double().mT).abs().max().item()
    tolerance = math.expm1(2 * largest_logit * torch.finfo(dtype).eps / 2)
    assert tolerance < 0.05
    expected = references.over_batch(references.mean_attention_map, q, k, 0.25)
    torch.testing.assert_close(mean, expected, check_dtype=False, rtol=tolerance, atol=1e-7)
    # The softmax itself is float32: in half precision rows would miss 1 by far more.
    torch.testing.assert_close(mean.sum(-1), torch.ones(2, 7), rtol=0, atol=1e-6)


def test_a_large_logit_does_not_overflow() -> None:
    q = torch.full((1, 1, 1, 4), 200.0, dtype=torch.float16)
    k = torch.stack([torch.full((4,), 200.0), torch.full((4,), -200.0)]).to(torch.float16)[None, None]
    # q k^T is 160 000, beyond float16; scaled by 1/8 it is 20 000.
    (a,) = attention_maps(q, k, 0.125)
    torch.testing.assert_close(a, torch.tensor([[[1.0, 0.0]]]))


def test_one_map_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = queries_and_keys((2, 4, 6, 6, 3))
    maps = attention_maps(q, k, 0.5)
    previous = weakref.ref(next(maps))
    assert previous() is None, "the iterator itself holds on to a map"

    freed = watch_maps(monkeypatch, module)
    mean_attention_map(q, k, 0.5)
    assert freed == [0, 1, 2, 3]


@pytest.mark.parametrize("block", [1, 300, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maps_in_turn_are_the_same_in_one_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    q, k = (x.to(dtype) for x in queries_and_keys((2, 4, 11, 7, 3)))
    expected = list(attention_maps(q, k, 0.5))
    with torch.no_grad():
        places = set()
        for a, one in zip(maps_in_turn(q, k, 0.5), expected, strict=True):
            torch.testing.assert_close(a, one)
            places.add(a.data_ptr())
        assert len(places) == 1
        with pytest.raises(ValueError, match="must be"):
            next(maps_in_turn(q, k[:1], 0.5))
    kept = list(maps_in_turn(q, k, 0.5))  # a gradient may be asked for, so each has its own
    assert all(torch.equal(a, one) for a, one in zip(kept, expected, strict=True))


def test_gradients_match_finite_differences() -> None:
    q, k = queries_and_keys((2, 2, 3, 4, 3))
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return (references.over_batch(references.mean_attention_map, q, k, 0.5) * weights).sum()

    q.requires_grad_()
    k.requires_grad_()
    gradients = torch.autograd.grad((mean_attention_map(q, k, 0.5) * weights).sum(), (q, k))
    q64, k64 = q.detach().double(), k.detach().double()
    expected_q = references.finite_difference(lambda x: loss(x, k64), q64)
    expected_k = references.finite_difference(lambda x: loss(q64, x), k64)
    assert expected_q.abs().max() > 0.01
    for gradient, expected in zip(gradients, (expected_q, expected_k), strict=True):
        torch.testing.assert_close(gradient, expected, check_dtype=False, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 5)),  # head width
        ((1, 2, 3, 4), (1, 1, 3, 4)),  # heads
        ((1, 2, 3, 4), (2, 2, 3, 4)),  # batch
        ((2, 3, 4), (2, 3, 4)),  # no heads
    ],
)
def test_unequal_shapes_are_refused_at_once(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        attention_maps(torch.zeros(q_shape), torch.zeros(k_shape), 1.0)  # not only when the first map is asked for


def test_autocast_is_off_inside_and_back_after() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with without_autocast(torch.device("meta")):  # a device that has no autocast
        pass
