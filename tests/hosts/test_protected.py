"""Regions that are never pruned, in a U-Net: their tokens stay in every block and step, or it is refused."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor

from atedm.hosts.models import check_protected
from atedm.hosts.state import Observation
from atedm.lab.ablation import Variant
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Method
from atedm.method.matched import Matched
from atedm.method.protection import protected_tokens
from atedm.patch import apply, is_applied, observed, pruned, remove
from models import EARLY, LATE, run, sdxl_unet, small_unet, snapshot

CORNER = torch.zeros(32, 32, dtype=torch.bool)
CORNER[:10, :7] = True
TURBO = AtEdm(spare=None)


@pytest.mark.parametrize(
    "method",
    [AtEdm(), Matched(), Variant(rank="cross-attention-entropy"), Variant(refresh_every=2)],
    ids=["paper", "matched", "cross-attention", "refreshed"],
)
@pytest.mark.parametrize("size", [(16, 16), (24, 10)])
def test_protected_tokens_are_kept_in_every_block_and_step(method: Method, size: tuple[int, int]) -> None:
    unet = sdxl_unet()
    before = snapshot(unet)
    seen: list[Observation] = []
    with pruned(unet, method, protect=CORNER), observed(unet, seen.append):
        for step in torch.tensor([EARLY, 800, LATE, 0]):
            run(unet, step, size=size)
    assert seen
    for one in seen:
        protected = protected_tokens(CORNER.float(), one.size).nonzero().flatten().tolist()
        for keep in one.keep.tolist():
            assert len(keep) < one.size[0] * one.size[1]
            assert set(protected) <= set(keep)
    assert snapshot(unet) == before


def test_what_is_no_mask_is_refused_and_nothing_is_applied() -> None:
    unet = small_unet()
    with pytest.raises(ValueError, match="one for all images"):
        apply(unet, protect=torch.ones(2, 8, 8))
    assert not is_applied(unet)


def test_more_than_is_kept_is_refused_by_the_first_step_and_a_lower_rate_would_do() -> None:
    unet = sdxl_unet()
    most: Tensor = torch.ones(8, 8)
    most[:, 4:] = 0
    apply(unet, TURBO, protect=most)
    with pytest.raises(ValueError, match=r"32 of the 64 tokens of .* and only 24 are kept; .* rate of 0\.5$"):
        run(unet)
    remove(unet)
    with pruned(unet, AtEdm(rate=0.5, spare=None), protect=most):
        run(unet)


@pytest.mark.parametrize("method", [Variant(schedule="prune-less-early"), AtEdm(where=lambda place: place.index == 0)])
def test_what_no_later_step_could_keep_is_refused_by_the_first(method: Method) -> None:
    unet = sdxl_unet()
    most = torch.zeros(8, 8)
    most[:5] = 1
    with pruned(unet, method, protect=most), pytest.raises(ValueError, match="are protected, and only"):
        run(unet, EARLY)


@pytest.mark.parametrize(
    "method",
    [AtEdm(), Matched(), Matched(level_factors=((2, 0.9), (3, 1.0)))],
    ids=["paper", "matched", "levels"],
)
def test_the_rate_that_is_named_protects_enough(method: AtEdm | Matched) -> None:
    unet = sdxl_unet()
    scattered = torch.zeros(256, 256)
    scattered[::40] = 1  # next to nothing of the image, but some of many a token
    with (
        pruned(unet, method, protect=scattered),
        pytest.raises(ValueError, match="protect less, or give a rate of") as refused,
    ):
        check_protected(unet, (32, 32))
    said = re.search(r"give a rate of ([\d.]+)$", str(refused.value))
    assert said is not None
    with pruned(unet, dataclasses.replace(method, rate=float(said[1])), protect=scattered):
        check_protected(unet, (32, 32))
        run(unet, LATE, size=(32, 32))
