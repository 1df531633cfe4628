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
from models import draw, run, sdxl_pipeline, small_unet

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


def tiny_unet() -> UNet2DConditionModel:
    """One attention block, which is spared: its two graphs are those of a dense and of a pruned block."""
    return small_unet(mid_block_type=None)


def expected(build: Callable[[], UNet2DConditionModel], config: PruningConfig | None) -> Tensor:
    unet = build()
    if config is not None:
        atedm.apply(unet, config)
    return outputs(unet)


@pytest.mark.parametrize(("build", "compile_it"), [(small_unet, wrapped), (tiny_unet, in_place)])
def test_compiled_first_it_has_two_more_graphs_and_is_dense_again_once_removed(build: Any, compile_it: Any) -> None:
    dense, pruned = expected(build, None), expected(build, PruningConfig())
    counter = CompileCounter()
    unet = compile_it(build(), counter)
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
    assert (pruned - dense)[-1].abs().max() > 0.1


@pytest.mark.parametrize("compile_it", [wrapped, in_place])
def test_applied_first_it_has_two_graphs_and_is_dense_once_removed(compile_it: Any) -> None:
    dense, pruned = expected(tiny_unet, None), expected(tiny_unet, PruningConfig())
    counter = CompileCounter()
    unet = tiny_unet()
    atedm.apply(unet)
    unet = compile_it(unet, counter)
    torch.testing.assert_close(outputs(unet), pruned)
    assert counter.frame_count == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(unet), pruned)
        # A step that is a tensor of its own has to be read, and still is no part of a graph.
        for i in (0, 11):
            torch.testing.assert_close(run(unet, STEPS[i].clone()), pruned[i])
    atedm.remove(unet)
    torch.testing.assert_close(outputs(unet), dense)
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(ranking="uniform-random", recovery="bicubic", place="before-feed-forward"),
        PruningConfig(
            ranking="cross-attention-power",
            recovery="direct-copy",
            gradual=((0, 0.3), (1, 0.4)),
            place="after-self-attention",
        ),
    ],
    ids=["random-bicubic", "cross-attention-gradual"],
)
def test_it_has_two_graphs_whatever_the_config(config: PruningConfig) -> None:
    pruned = expected(tiny_unet, config)
    counter = CompileCounter()
    unet = tiny_unet()
    atedm.apply(unet, config)
    torch.testing.assert_close(outputs(wrapped(unet, counter)), pruned)
    assert counter.frame_count == 2


def test_matched_pruning_that_remembers_nothing_is_one_graph() -> None:
    config = atedm.PRESETS["matched"].replace(own_update_share=0.0)
    pruned = expected(tiny_unet, config)
    counter = CompileCounter()
    unet = tiny_unet()
    atedm.apply(unet, config)
    torch.testing.assert_close(outputs(wrapped(unet, counter)), pruned)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        # With nothing chosen before, with a choice, and with one that is too old.
        (PruningConfig(refresh_every=3, schedule="constant"), {2, 3}),
        (atedm.PRESETS["matched"], {2}),  # in the first step there are no own updates
    ],
    ids=["a-choice-for-three-steps", "own-updates"],
)
def test_what_is_remembered_takes_graphs_of_its_own(config: PruningConfig, graphs: set[int]) -> None:
    pruned = expected(tiny_unet, config)
    counter = CompileCounter()
    unet = tiny_unet()
    atedm.apply(unet, config)
    compiled = wrapped(unet, counter)
    torch.testing.assert_close(outputs(compiled), pruned)
    assert counter.frame_count in graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(outputs(compiled), pruned)


def test_repeated_blocks_can_be_compiled_on_their_own() -> None:
    dense, pruned = expected(small_unet, None), expected(small_unet, PruningConfig())
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
    pipe = sdxl_pipeline(tiny_unet())
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
