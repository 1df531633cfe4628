"""Steps and memory of runs in ComfyUI, by the sigmas and the conditions that it tells of."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atedm.hosts.comfyui_runs import Run
from atedm.method.contract import Memory
from comfyui_standin import ModelSampling

SIGMAS = torch.tensor([10.0, 6.0, 3.0, 1.0, 0.0])


def call(run: Run, sigma: float, conditions: str = "ab") -> Any:
    """Evaluate conditions at a sigma: give what they remember, and let them store the sigma for each."""
    run.begin_call({"sigmas": torch.tensor([sigma]), "uuids": list(conditions)})
    memory = run.memory("span")
    last = memory.last
    memory.begin_step(follows=True)
    memory.store(torch.full((len(conditions), 1), sigma))
    run.remember("span", memory)
    return None if last is None else [*last.flatten().tolist()]


def test_steps_are_counted_by_sigmas() -> None:
    run = Run.of(SIGMAS)
    for sigma, step in ((10.0, 0), (8.0, 1), (6.0, 1), (3.0000002, 2), (1.0, 3), (0.5, 3), (12.0, 0)):
        run.begin_call({"sigmas": torch.tensor([sigma])})
        assert (run.step, run.share) == (step, step / 4), sigma


def test_a_run_that_starts_late_is_late() -> None:
    run = Run.of(SIGMAS[1:], ModelSampling())
    run.begin_call({"sigmas": SIGMAS[1:2]})
    assert (run.step, run.share) == (0, pytest.approx(0.4))
    run.begin_call({"sigmas": SIGMAS[3:4]})
    assert (run.step, run.share) == (2, pytest.approx(0.8))
    ends_early = Run.of(SIGMAS[:4], ModelSampling())
    ends_early.begin_call({"sigmas": SIGMAS[2:3]})
    assert ends_early.share == pytest.approx(0.9 * 2 / 3)


def test_conditions_remember_in_whatever_batch_they_come() -> None:
    run = Run.of(SIGMAS)
    assert call(run, 10.0, "ab") is None
    assert call(run, 6.0, "ba") == [10.0, 10.0]
    assert [call(run, 3.0, name) for name in "ab"] == [[6.0], [6.0]]
    assert call(run, 1.0, "ab") == [3.0, 3.0]


def test_what_does_not_follow_finds_nothing() -> None:
    run = Run.of(SIGMAS)
    call(run, 10.0)
    assert call(run, 3.0) is None  # a step was left out
    assert call(run, 1.0) == [3.0, 3.0]
    assert call(run, 6.0) is None  # the sampler went back
    call(run, 3.0, "a")
    assert call(run, 1.0, "ab") is None  # b was not there


def test_samplers_of_second_order_remember_and_tiles_do_not() -> None:
    heun = Run.of(SIGMAS)
    found = [call(heun, sigma) for sigma in (10.0, 6.0, 6.0, 3.0, 3.0, 1.0)]
    assert found == [None, [10.0] * 2, [6.0] * 2, [6.0] * 2, [3.0] * 2, [3.0] * 2]
    tiles = Run.of(SIGMAS)
    assert [call(tiles, sigma) for sigma in (10.0, 10.0, 6.0, 6.0, 3.0)] == [None] * 5
    assert tiles.is_ambiguous
    windows = Run.of(SIGMAS)
    assert [call(windows, sigma) for sigma in (10.0, 6.0, 6.0, 6.0, 3.0)][3:] == [None] * 2


def test_a_span_that_was_dense_in_a_step_remembers_nothing() -> None:
    run = Run.of(SIGMAS)
    call(run, 10.0)
    run.begin_call({"sigmas": SIGMAS[1:2], "uuids": ["a", "b"]})
    run.remember("span", Memory())
    assert call(run, 3.0) is None


def test_without_ids_of_conditions_nothing_is_remembered() -> None:
    run = Run.of(())
    for _ in range(2):
        run.begin_call({"sigmas": torch.tensor([5.0])})
        assert run.memory("span").last is None
        memory = Memory()
        memory.store(torch.zeros(2, 1))
        run.remember("span", memory)
    assert run.stored == {}


@given(
    st.lists(st.tuples(st.sampled_from([10.0, 6.0, 3.0, 1.0]), st.sampled_from(["a", "b", "ab", "ba"])), max_size=30)
)
def test_nobody_is_told_what_another_stored(calls: list[tuple[float, str]]) -> None:
    run, stored = Run.of(SIGMAS), {}
    for number, (sigma, conditions) in enumerate(calls):
        run.begin_call({"sigmas": torch.tensor([sigma]), "uuids": [*conditions]})
        memory = run.memory("span")
        if memory.last is not None:
            assert memory.last.flatten().tolist() == [stored[name] for name in conditions]
        memory.store(torch.tensor([[float(number)], [number + 0.5]])[: len(conditions)])
        run.remember("span", memory)
        stored |= {name: number + 0.5 * place for place, name in enumerate(conditions)}
