"""Faults in a pruned U-Net: NaNs, types that do not fit, and errors anywhere leave nothing behind."""

import random
from typing import Any

import pytest
import torch

import atedm
from atedm.lab.ablation import Variant
from atedm.method.contract import Method
from atedm.method.map_scores import scores_in_blocks, scores_of_map
from faults import faults
from models import LATE, draw, inputs, run, sdxl_pipeline, sdxl_unet, small_unet, snapshot

METHODS: dict[str, Method] = {
    **atedm.METHODS,
    "the whole map": atedm.AtEdm(sample=None),
    "sampled": Variant(map_mode="sampled"),
    "words": Variant(rank="cross-attention-power"),
    "cosine": Variant(match="cosine"),
    "bicubic": Variant(refill="bicubic"),
}


def poison(x: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """Put NaNs or infinities into the first of a batch."""
    x = x.clone()
    value = chance.choice([float("nan"), float("inf"), -float("inf")])
    where = torch.rand(x[0].shape, generator=torch.Generator().manual_seed(chance.randrange(1000)))
    x[0][where < chance.choice([0.01, 0.5, 2.0])] = value
    return x


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_none_stay_with_their_image(name: str) -> None:
    """The other images of the batch are bit for bit what they are without, and the next call is as if nothing was."""
    unet = sdxl_unet()
    with atedm.pruned(unet, METHODS[name]):
        for chance in faults("NaN or infinity in the latents", 0.1 / len(METHODS)):
            call = inputs(unet)
            whole = run(unet, **call)
            poisoned = run(unet, **(call | {"sample": poison(call["sample"], chance)}))
            assert torch.equal(poisoned[1], whole[1])
            assert not torch.isfinite(poisoned[0]).all()
            assert torch.equal(run(unet, **call), whole)


@pytest.mark.parametrize("way", [scores_of_map, scores_in_blocks])
def test_numbers_that_are_none_in_a_map_give_places_that_are_there(way: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for chance in faults("NaN or infinity in the map", 0.02):
        q, k = (torch.randn(2, 3, 24, 8, generator=generator) for _ in "qk")
        bad_q, bad_k = (poison(x, chance) if chance.random() < 0.7 else x for x in (q, k))
        scores, whole = way(bad_q, bad_k, 0.3), way(q, k, 0.3)
        source = scores.source(scores.importance.topk(9).indices.sort().values)
        assert ((source >= 0) & (source < 9)).all()
        assert torch.equal(scores.importance[1], whole.importance[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_type_that_does_not_fit_is_refused_as_by_the_dense_model(dtype: torch.dtype) -> None:
    unet = sdxl_unet()
    call = inputs(unet)
    wrong = call | {"sample": call["sample"].to(dtype)}
    dense = run(unet, **call)
    with pytest.raises(RuntimeError) as refused:
        unet(timestep=LATE, **wrong)
    for name in ("paper", "matched"):
        with atedm.pruned(unet, name):
            pruned = run(unet, **call)
            with pytest.raises(RuntimeError) as told:
                unet(timestep=LATE, **wrong)
            assert str(told.value) == str(refused.value)
            assert torch.equal(run(unet, **call), pruned)
    assert torch.equal(run(unet, **call), dense)


class Injected(Exception):
    pass


def test_an_error_in_any_module_leaves_nothing_behind() -> None:
    pipe = sdxl_pipeline(small_unet())
    dense, before = draw(pipe), snapshot(pipe.unet)
    modules = [module for module in pipe.unet.modules() if module is not pipe.unet]
    fresh = {}
    for name in ("paper", "matched"):
        with atedm.pruned(pipe, name):
            fresh[name] = draw(pipe)
    for chance in faults("error in a module", 0.12):
        name = chance.choice([*fresh])
        calls = chance.randrange(8)

        def fail(*_: Any) -> None:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise chance.choice([Injected, KeyboardInterrupt])  # noqa: B023

        atedm.apply(pipe, name)
        hook = chance.choice(modules).register_forward_pre_hook(fail)
        try:
            draw(pipe)
        except (Injected, KeyboardInterrupt):
            pass
        finally:
            hook.remove()
        assert torch.equal(draw(pipe), fresh[name])
        atedm.remove(pipe)
        assert torch.equal(draw(pipe), dense)
    assert snapshot(pipe.unet).keys() == before.keys()
