"""Numbers in a U-Net: images equal everywhere, one token kept or all but one, another default dtype."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from atedm.hosts.state import Observation
from atedm.lab.ablation import Variant
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Method
from atedm.method.matched import Matched
from atedm.method.presets import METHODS
from atedm.patch import observed, pruned
from models import LATE, distance, inputs, run, sdxl_unet, small_unet

BASES = {
    "paper": AtEdm(spare=None),
    "blocked": Variant(map_mode="blocked", schedule="constant"),
    "matched": Matched(level_factors=(), own_update_share=0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_image_that_is_equal_everywhere_is_pruned(name: str) -> None:
    unet = sdxl_unet()
    call = inputs(unet) | {"sample": torch.zeros(2, 4, 16, 16)}
    with pruned(unet, name):
        first, again = (run(unet, LATE, **call) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("left", ["one", "all but one"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_one_token_kept_or_dropped(base: Any, left: str, batch: int) -> None:
    unet = small_unet()
    tokens = 64
    rate = (tokens - 1) / tokens if left == "one" else 1 / tokens
    method = dataclasses.replace(base, rate=rate)
    seen: list[Observation] = []
    with pruned(unet, method), observed(unet, seen.append):
        out = run(unet, LATE, batch=batch)
    counts = {one.keep.shape[1] for one in seen}
    assert counts == ({1} if left == "one" else {tokens - 1})
    assert torch.isfinite(out).all()
    if batch == 16:
        with pruned(unet, method):
            call = inputs(unet, batch=16)
            alone = run(unet, LATE, **{
                name: value[5:6] if isinstance(value, Tensor) else {key: part[5:6] for key, part in value.items()}
                for name, value in call.items()
            })  # fmt: skip
        assert distance(out[5:6], alone) < 1e-3


@pytest.mark.parametrize("method", [Matched(), AtEdm()], ids=["matched", "paper"])
def test_torchs_default_dtype_does_not_matter(method: Method) -> None:
    unet = sdxl_unet()
    call = inputs(unet) | {"timestep": LATE}
    with pruned(unet, method), torch.no_grad():
        expected = unet(**call).sample
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(unet(**call).sample, expected)
        finally:
            torch.set_default_dtype(torch.float32)
