"""Under torch.compile: two graphs, one of an early step and one of a normal one, and none ever again."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import atedm
from atedm import AtEdm, Matched
from atedm.method.contract import Method
from models import draw, run, sdxl_pipeline, small_unet

STEPS = torch.linspace(999, 0, 10)  # more than torch._dynamo recompiles before it gives up


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


def tiny_unet() -> UNet2DConditionModel:
    """One attention block, which is spared: its two graphs are those of a dense and of a pruned block."""
    return small_unet(mid_block_type=None)


def expected(build: Callable[[], UNet2DConditionModel], method: Method | None) -> Tensor:
    unet = build()
    if method is not None:
        atedm.apply(unet, method)
    return outputs(unet)


def test_compiled_first_it_has_two_more_graphs_and_is_dense_again_once_removed() -> None:
    dense, pruned = expected(tiny_unet, None), expected(tiny_unet, AtEdm())
    counter = CompileCounter()
    unet = wrapped(tiny_unet(), counter)
    torch.testing.assert_close(outputs(unet), dense)
    assert counter.frame_count == 1
    atedm.apply(unet, "paper")
    torch.testing.assert_close(run(unet, STEPS[0]), pruned[0])
    torch.testing.assert_close(run(unet, STEPS[-1]), pruned[-1])
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
        atedm.remove(unet)
        torch.testing.assert_close(outputs(unet), dense)
        atedm.apply(unet, "paper")
        torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count == 3
    assert (pruned - dense)[-1].abs().max() > 0.1


@pytest.mark.parametrize("compile_it", [wrapped, in_place])
def test_applied_first_it_has_two_graphs_and_is_dense_once_removed(compile_it: Any) -> None:
    dense, pruned = expected(tiny_unet, None), expected(tiny_unet, AtEdm())
    counter = CompileCounter()
    unet = tiny_unet()
    atedm.apply(unet, "paper")
    unet = compile_it(unet, counter)
    torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
        # A step that is a tensor of its own has to be read, and still is no part of a graph.
        for i in (0, 9):
            torch.testing.assert_close(run(unet, STEPS[i].clone()), pruned[i])
        # Nor does an error keep the model busy.
        with pytest.raises(ValueError, match="attention_mask"):
            run(unet, STEPS[0], attention_mask=torch.ones(2, 64))
        with ThreadPoolExecutor(1) as thread:
            torch.testing.assert_close(thread.submit(run, unet, STEPS[0]).result(), pruned[0])
    atedm.remove(unet)
    torch.testing.assert_close(outputs(unet), dense)
    assert counter.frame_count == 3


def rank_by_step(view: atedm.View) -> Tensor:
    return (view.tokens.float().square().mean(-1) * 1000).sin() * (1 + view.step)


def refill_with_the_mean(to_refill: atedm.ToRefill) -> Tensor:
    mean = to_refill.kept.mean(1, keepdim=True).expand_as(to_refill.before)
    return mean.scatter(1, to_refill.keep.unsqueeze(-1).expand_as(to_refill.kept), to_refill.kept)


@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        (AtEdm(spare=None), 1),
        (AtEdm(rank=rank_by_step, refill=refill_with_the_mean), 2),
        (Matched(own_update_share=0.0), 1),
        (Matched(), 2),  # in the first step there are no updates to remember
    ],
    ids=["turbo", "own functions", "remembers nothing", "remembers"],
)
def test_a_method_has_a_graph_for_each_kind_of_step(method: Method, graphs: int) -> None:
    pruned = expected(tiny_unet, method)
    counter = CompileCounter()
    unet = tiny_unet()
    atedm.apply(unet, method)
    compiled = wrapped(unet, counter)
    torch.testing.assert_close(outputs(compiled), pruned)
    assert counter.frame_count == graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(compiled), pruned)


def test_repeated_blocks_can_be_compiled_on_their_own() -> None:
    dense, pruned = expected(small_unet, None), expected(small_unet, AtEdm())
    counter = CompileCounter()
    unet = small_unet()
    atedm.apply(unet, "paper")
    unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count >= 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
        atedm.remove(unet)
        torch.testing.assert_close(outputs(unet), dense)


def test_a_compiled_pipeline_draws_what_it_draws_uncompiled() -> None:
    pipe = sdxl_pipeline(tiny_unet())
    atedm.apply(pipe, "paper")
    image = draw(pipe, num_inference_steps=5)
    counter = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
    assert atedm.is_applied(pipe)
    torch.testing.assert_close(draw(pipe, num_inference_steps=5), image, rtol=1e-3, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(pipe, num_inference_steps=5)
        draw(pipe, num_inference_steps=7)
    assert counter.frame_count == 2
