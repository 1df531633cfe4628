"""Caches of diffusers as candidates: they skip work, nothing is carried over between runs, and nothing stays."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from atedm.lab.methods.by_name import method_by_name
from atedm.lab.methods.counting import flop_counter
from atedm.lab.methods.diffusers_caches import CACHES, FirstBlockCache
from models import sdxl_unet
from transformers_of import call_of, image_of, transformer

STEPS = [0.95, 0.8, 0.65, 0.5, 0.35, 0.2]


def run(model: Any, name: str) -> Tensor:
    """The outputs of a run of a few steps."""
    with torch.no_grad():
        return torch.stack([image_of(model(**call_of(name, noise=noise))) for noise in STEPS])


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("first-block-cache[threshold=0.9]", "FluxTransformer2DModel"),
        ("taylorseer[interval=2,warmup=1]", "FluxTransformer2DModel"),
        ("taylorseer[interval=2,warmup=1]", "SD3Transformer2DModel"),
        ("pyramid", "SD3Transformer2DModel"),
    ],
)
def test_a_cache_skips_work_and_leaves_no_trace(spec: str, name: str) -> None:
    model = transformer(name)
    dense = run(model, name)
    pipe = SimpleNamespace(transformer=model)
    with flop_counter() as whole:
        run(model, name)
    with method_by_name(spec, "flux").applied(pipe):
        with flop_counter() as counted:
            first = run(model, name)
        if name.startswith("SD3"):  # whose pipeline does not clear a cache; that of FLUX does
            assert torch.equal(run(model, name), first)
    assert counted.get_total_flops() < whole.get_total_flops()
    assert torch.isfinite(first).all()
    assert not torch.equal(first, dense)
    assert torch.equal(run(model, name), dense)


def test_what_cannot_be_is_said() -> None:
    with (
        pytest.raises(ValueError, match="is for transformers; a U-Net has deepcache"),
        CACHES["pyramid"]().applied(SimpleNamespace(unet=sdxl_unet())),
    ):
        pass
    sd3 = SimpleNamespace(transformer=transformer("SD3Transformer2DModel"))
    with pytest.raises(ValueError, match="does not run on SD3"), FirstBlockCache().applied(sd3):
        pass
    with pytest.raises(ValueError, match="threshold must be 0 or more"):
        method_by_name("first-block-cache[threshold=-1]", "flux")
    with pytest.raises(ValueError, match="interval must be a whole number of at least 1"):
        method_by_name("taylorseer[interval=0]", "flux")
