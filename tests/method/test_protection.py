"""Regions that are never pruned: how masks are read, and that their tokens stay whatever the ranking says."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atedm.method.keep import keep_most_important, put_first
from atedm.method.protection import protected_tokens, region, with_protected

CORNER = torch.zeros(32, 32, dtype=torch.bool)
CORNER[:10, :7] = True


@pytest.mark.parametrize(
    "mask",
    [
        CORNER,
        CORNER.float().expand(1, 1, 32, 32),
        255 * CORNER.byte(),
        CORNER.numpy(),
        Image.fromarray(255 * CORNER.numpy().astype(np.uint8)),
        Image.fromarray(255 * CORNER.numpy().astype(np.uint8)).convert("RGB"),
        CORNER.byte(),
        CORNER.long(),
        CORNER.numpy().astype(">f4"),
        CORNER.flip(0).numpy()[::-1],
        np.asarray(Image.fromarray(255 * CORNER.numpy().astype(np.uint8))),
        1.04 * CORNER.float(),
        40000 * CORNER.numpy().astype(np.uint16) + 20000,
        Image.fromarray(40000 * CORNER.numpy().astype(np.uint16) + 20000),
    ],
    ids=[
        "bool",
        "float with axes",
        "bytes",
        "array",
        "picture",
        "picture in colour",
        "bytes of ones",
        "whole numbers",
        "of another byte order",
        "back to front",
        "read only",
        "a little above one",
        "16 bits",
        "picture of 16 bits",
    ],
)
def test_a_mask_may_be_given_in_many_ways(mask: Any) -> None:
    assert torch.equal(region(mask), CORNER.float())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1, 2], TypeError, "not a list"),
        (torch.ones(2, 8, 8), ValueError, "one for all images"),
        (torch.ones(8), ValueError, r"must be \(H, W\)"),
        (torch.ones(0, 8), ValueError, r"must be \(H, W\)"),
        (255 * torch.ones(8, 8), ValueError, "a mask of float32 that goes up to 255 may mean anything"),
        (200 * np.ones((8, 8), np.int64), ValueError, "give zeros and ones, or uint8 from 0 to 255"),
        (np.array([["a"]]), TypeError, "an array of numbers"),
    ],
)
def test_what_is_no_mask_is_said(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        region(mask)


@settings(deadline=None, derandomize=True)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_a_token_is_protected_if_some_of_its_place_is(height: int, width: int, h: int, w: int, seed: int) -> None:
    mask = (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.1).float()
    tokens = protected_tokens(mask, (h, w)).reshape(h, w)
    for y in range(h):
        for x in range(w):
            # The pixels that the place touches, in whole numbers.
            rows = range(y * height // h, -(-(y + 1) * height // h))
            columns = range(x * width // w, -(-(x + 1) * width // w))
            assert tokens[y, x] == max(float(mask[i, j]) for i in rows for j in columns)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), st.data())
def test_protected_ones_come_first_and_the_others_stay(values: list[float], data: st.DataObject) -> None:
    which = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    importance, protected = torch.tensor([values], dtype=torch.float64), torch.tensor(which).float()
    ranked = with_protected(importance, protected)
    others = [i for i, is_one in enumerate(which) if not is_one]
    assert torch.equal(ranked[0, others], importance[0, others])
    count = sum(which)
    if count:
        assert set(keep_most_important(ranked, count)[0].tolist()) == {i for i, is_one in enumerate(which) if is_one}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "values",
    [[1.0, -torch.inf, 0.5, 2.0], [torch.inf, 3.0, 1.0, 2.0], [torch.nan, 0.0, 1.0, torch.inf], [torch.inf] * 4,
     [-6e4, 6e4, 0.0, 1.0], [-torch.inf] * 3 + [torch.nan]],
    ids=str,
)  # fmt: skip
def test_no_importance_comes_before_what_is_protected(values: list[float], dtype: torch.dtype) -> None:
    importance = torch.tensor([values], dtype=dtype)
    for place in range(4):
        protected = torch.zeros(4)
        protected[place] = 1
        assert keep_most_important(with_protected(importance, protected), 1).item() == place
    order = with_protected(importance, torch.zeros(4))
    assert order.isfinite().all()
    ranked = importance.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    assert torch.equal(keep_most_important(order, 2), keep_most_important(ranked, 2))


def test_without_a_mask_nothing_changes_and_the_first_may_differ_by_image() -> None:
    importance = torch.tensor([[0.3, torch.nan, 0.1], [0.2, 0.5, torch.inf]])
    assert with_protected(importance, None) is importance
    first = torch.tensor([[False, True, False], [True, False, False]])
    assert keep_most_important(put_first(importance, first), 1).tolist() == [[1], [0]]
