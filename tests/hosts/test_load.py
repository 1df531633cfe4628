"""Threads and service: pipelines draw what they draw alone, a U-Net serves one thread at a time, memory is flat."""

import copy
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

import atedm
from atedm.app.models import load_pipeline
from in_a_row import growth, in_a_row
from models import draw, inputs, run, sdxl_pipeline, small_unet, snapshot

METHODS = ("paper", "matched", None)


def pruned_pipeline(method: str | None) -> Any:
    pipe = sdxl_pipeline(small_unet(seed=1))
    # Each has tokenizers of its own: one tokenizer cannot be told of two paddings at once.
    pipe.register_modules(**{name: copy.deepcopy(getattr(pipe, name)) for name in ("tokenizer", "tokenizer_2")})
    if method is not None:
        atedm.apply(pipe, method)
    return pipe


def test_pipelines_in_several_threads_draw_what_they_draw_alone() -> None:
    pipes = [pruned_pipeline(method) for method in METHODS]
    alone = [[draw(pipe, seed) for seed in range(2)] for pipe in pipes]
    assert len({float(images[0].sum()) for images in alone}) == len(METHODS)
    start = threading.Barrier(len(pipes))

    def serve(pipe: Any) -> list[Tensor]:
        start.wait()
        return [draw(pipe, seed) for seed in range(2)]

    with ThreadPoolExecutor(len(pipes)) as threads:
        together = [*threads.map(serve, pipes)]
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Held:
    """A U-Net in the middle of a step in another thread, until it is let go."""

    def __init__(self, unet: Any) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        layer = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
        self.owner: int | None = None
        self.hook = layer.register_forward_pre_hook(self.wait)
        self.thread = ThreadPoolExecutor(1)
        self.drawn = self.thread.submit(self.draw, unet)
        assert self.inside.wait(60)

    def draw(self, unet: Any) -> Tensor:
        self.owner = threading.get_ident()
        with torch.no_grad():
            return run(unet)

    def wait(self, *_: Any) -> None:
        if threading.get_ident() == self.owner:
            self.inside.set()
            assert self.go.wait(60)

    def let_go(self) -> Tensor:
        self.go.set()
        drawn = self.drawn.result(60)
        self.hook.remove()
        self.thread.shutdown()
        return drawn


@pytest.mark.parametrize("intrude", [run, atedm.remove], ids=["call", "remove"])
def test_a_unet_in_the_middle_of_a_step_is_refused_to_other_threads(intrude: Callable[[Any], Any]) -> None:
    unet = small_unet()
    atedm.apply(unet, "matched")
    with torch.no_grad():
        alone = run(unet)
    held = Held(unet)
    with pytest.raises(RuntimeError, match="in the middle of a step in another thread"):
        intrude(unet)
    assert torch.equal(held.let_go(), alone)
    with torch.no_grad():
        assert torch.equal(run(unet), alone)
    atedm.remove(unet)


def test_a_copy_serves_another_thread_meanwhile() -> None:
    unet = small_unet()
    atedm.apply(unet, "paper")
    with torch.no_grad():
        alone = run(unet)
        twin = copy.deepcopy(unet)
        held = Held(unet)
        assert torch.equal(run(twin), alone)
    held.let_go()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_broke_off_keeps_nobody_out(error: type[BaseException]) -> None:
    unet = small_unet()
    atedm.apply(unet)
    layer = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))

    def break_off(*_: Any) -> None:
        raise error

    with ThreadPoolExecutor(1) as thread:
        hook = layer.register_forward_pre_hook(break_off)
        with pytest.raises(error):
            thread.submit(run, unet).result()
        hook.remove()
        alone = run(copy.deepcopy(unet))
        if error is KeyboardInterrupt:  # of which torch tells no hook
            with pytest.raises(RuntimeError, match="in the middle of a step in another thread"):
                run(unet)
            assert torch.equal(thread.submit(run, unet).result(), alone)
        assert torch.equal(run(unet), alone)  # while the other thread lives
        hook = layer.register_forward_pre_hook(break_off)
        with pytest.raises(error):
            thread.submit(run, unet).result()
        hook.remove()
    assert torch.equal(run(unet), alone)  # when it is gone
    atedm.remove(unet)


def test_of_a_refused_call_nothing_is_left_and_its_thread_may_go_on_later() -> None:
    unet = small_unet()
    atedm.apply(unet)
    alone = run(unet)
    held = Held(unet)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="call it from one thread at a time, or give each its own"):
            run(unet)
    held.let_go()
    with ThreadPoolExecutor(1) as threads:
        assert torch.equal(threads.submit(run, unet).result(), alone)
    assert torch.equal(run(unet), alone)


def test_copies_draw_in_parallel_what_they_draw_alone() -> None:
    unet = small_unet()
    atedm.apply(unet)
    steps = torch.linspace(999, 0, 6)
    with torch.no_grad():
        alone = [run(unet, timestep) for timestep in steps]
    copies = [unet, copy.deepcopy(unet), copy.deepcopy(unet)]
    start = threading.Barrier(len(copies))

    def serve(model: Any) -> list[Tensor]:
        start.wait()
        return [run(model, timestep) for timestep in torch.linspace(999, 0, 6)]

    with ThreadPoolExecutor(len(copies)) as threads:
        for drawn in threads.map(serve, copies):
            assert all(torch.equal(a, b) for a, b in zip(drawn, alone, strict=True))


def test_of_two_threads_that_patch_at_once_one_is_refused() -> None:
    for _ in range(10):
        unet = small_unet()
        before = snapshot(unet)
        start = threading.Barrier(2)

        def patch(method: str, unet: Any = unet, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                atedm.apply(unet, method)
            except ValueError:
                return False
            return True

        with ThreadPoolExecutor(2) as threads:
            assert sorted(threads.map(patch, ("paper", "matched"))) == [False, True]
        atedm.remove(unet)
        assert snapshot(unet) == before


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_tensors_do_not_pile_up_over_many_runs(method: str) -> None:
    unet = small_unet()
    atedm.apply(unet, method)
    call = inputs(unet)

    def serve(runs: int) -> int:
        with torch.no_grad():
            for _ in range(runs):
                for timestep in torch.tensor([999, 500, 1]):
                    unet(**call, timestep=timestep)
        gc.collect()
        return sum(1 for one in gc.get_objects() if isinstance(one, Tensor))

    serve(2)
    assert serve(2) == serve(12)


def test_images_in_a_row_take_no_more_memory_and_do_not_drift() -> None:
    """A few of them; `tests/in_a_row.py` draws thousands."""
    seen = in_a_row(load_pipeline("tiny", device="cpu"), 16, 4)
    assert seen.drift == 0
    assert growth(seen.memory) < 30
