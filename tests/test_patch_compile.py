"""Under torch.compile: two graphs, one of a prune-less step and one of a normal one, and none ever again."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import atedm
from atedm.config import PruningConfig
from models import run, sdxl_pipeline, draw, small_unet

STEPS = torch.linspace(999, 0, 12)  # more than torch._dynamo recompiles before it gives up


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(unet: Any, timesteps: Tensor = STEPS) -> Tensor:
    return torch.stack([run(unet, t) for t in timesteps])


def wrapped(unet: UNet2DConditionModel, backend: Any) -> Any:
    return torch.compile(unet, fullgraph=True, backend=backend)


def in_place(unet: UNet2DConditionModel, backend: Any) -> Any:
    unet.compile(fullgraph=True, backend=backend)
    return unet


def expected(config: PruningConfig | None) -> Tensor:
    unet = small_unet()
    if config is not None:
        atedm.apply(unet, config)
    return outputs(unet)


@pytest.mark.parametrize("compile_it", [wrapped, in_place])
def test_compiled_before_or_after_it_has_two_graphs_and_is_dense_again_once_removed(
    compile_it: Callable[..., Any],
) -> None:
    dense, pruned = expected(None), expected(PruningConfig())
    counter = CompileCounter()
    unet = compile_it(small_unet(), counter)
    torch.testing.assert_close(outputs(unet), dense)
    assert counter.frame_count == 1
    atedm.apply(unet)
    torch.testing.assert_close(run(unet, STEPS[0]), pruned[0])
    torch.testing.assert_close(run(unet, STEPS[-1]), pruned[-1])
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
        atedm.remove(unet)
        torch.testing.assert_close(outputs(unet), dense)
        atedm.apply(unet)
        torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count == 3
    assert (pruned - dense).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig(ranking="uniform-random", recovery="bicubic", place="before-feed-forward"),
        PruningConfig(ranking="cross-attention-power", recovery="direct-copy", gradual=((0, 0.3), (1, 0.4))),
    ],
    ids=["paper", "random-bicubic", "cross-attention-gradual"],
)
def test_applied_first_it_has_two_graphs_whatever_the_config(config: PruningConfig) -> None:
    pruned = expected(config)
    counter = CompileCounter()
    plain = small_unet()
    atedm.apply(plain, config)
    unet = wrapped(plain, counter)
    torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count == 2


def test_a_step_may_be_handed_over_in_any_way() -> None:
    counter = CompileCounter()
    unet = wrapped(small_unet(), counter)
    atedm.apply(unet)
    pruned = outputs(unet._orig_mod)
    graphs = []
    for make in (lambda i: STEPS[i], lambda i: STEPS[i].clone(), lambda i: STEPS[i].expand(2), lambda i: STEPS[i].repeat(2)):
        for i in (0, 11):
            torch.testing.assert_close(run(unet, make(i)), pruned[i])
        graphs.append(counter.frame_count)
    assert graphs == [2, 2, 4, 4]  # one number, or one for each image


def test_repeated_blocks_can_be_compiled_on_their_own() -> None:
    dense, pruned = expected(None), expected(PruningConfig())
    counter = CompileCounter()
    unet = small_unet()
    atedm.apply(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count >= 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
        atedm.remove(unet)
        torch.testing.assert_close(outputs(unet), dense)


def test_a_compiled_pipeline_draws_what_it_draws_uncompiled() -> None:
    pipe = sdxl_pipeline(small_unet())
    atedm.apply(pipe)
    image = draw(pipe, num_inference_steps=10)
    counter = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
    assert atedm.is_applied(pipe)
    torch.testing.assert_close(draw(pipe, num_inference_steps=10), image, rtol=1e-3, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(pipe, num_inference_steps=10)
        draw(pipe, num_inference_steps=7)
    assert counter.frame_count == 2
