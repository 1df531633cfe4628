"""Turns: every method once in every round, so that what slows the machine for a while slows all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from atedm.hosts.models import find_model
from atedm.lab.bench.peak import peak_of
from atedm.lab.methods.candidates import Candidate
from atedm.lab.methods.counting import run_of_steps
from atedm.lab.progress import Progress
from atedm.lab.shared_weights import copy_with_shared_weights
from atedm.lab.timing import Stopwatch


class Turns(NamedTuple):
    """What a method took."""

    #: Milliseconds of each round that counts.
    times: list[float]
    #: Bytes of activations at the highest point of one call more; None where they were not asked for.
    peak: int | None


class _Turn(NamedTuple):
    """What a method does in a round."""

    act: Callable[[], object]
    #: What surrounds it and is not timed.
    applied: Callable[[], AbstractContextManager[object]] = nullcontext
    #: How many steps its time is divided by.
    steps: int = 1


@torch.no_grad()
def steps_in_turns(
    model: Any,
    call: dict[str, Any],
    methods: Mapping[str, Candidate],
    repeats: int,
    progress: Progress,
    *,
    memory: bool = False,
) -> dict[str, Turns]:
    """Time a call of a model with each method, the mean over a cycle of those that work in cycles.

    Rounds are steps of a run, one after another, so that what a method remembers from step to step is at hand. Each
    method has a copy of the model on its weights; ``call`` is what it takes besides the timestep.
    """
    with ExitStack() as stack:
        turns = {}
        for name, candidate in methods.items():
            steps = candidate.cycle * (repeats + 1 + memory)
            copied = copy_with_shared_weights(model)
            step = stack.enter_context(run_of_steps(copied, call, candidate, steps))
            turns[name] = _Turn(partial(_several, step, candidate.cycle), steps=candidate.cycle)
        return _in_turns(turns, model.device, repeats, progress, memory)


def images_in_turns(
    pipe: Any,
    call: Mapping[str, Any],
    methods: Mapping[str, Candidate],
    steps: int,
    repeats: int,
    progress: Progress,
    *,
    memory: bool = False,
) -> dict[str, Turns]:
    """Time whole images with each method, from words to pixels, always from the same noise.

    Applying and removing are not part of it; ``call`` is what the pipeline takes besides steps and noise.
    """

    def draw(candidate: Candidate) -> object:
        noise = torch.Generator("cpu").manual_seed(0)
        return pipe(**call, num_inference_steps=candidate.steps_of(steps), generator=noise)

    turns = {name: _Turn(partial(draw, each), partial(each.applied, pipe)) for name, each in methods.items()}
    return _in_turns(turns, find_model(pipe).device, repeats, progress, memory)


def _several(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def _in_turns(
    turns: Mapping[str, _Turn], device: torch.device, repeats: int, progress: Progress, memory: bool
) -> dict[str, Turns]:
    """Take every turn once a round."""
    rounds = repeats + 1 + memory
    times: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int | None] = dict.fromkeys(turns)
    for done in range(rounds):
        for index, (name, turn) in enumerate(turns.items()):
            with turn.applied():
                if done > repeats:
                    peaks[name] = peak_of(turn.act, device)
                else:
                    watch = Stopwatch(device)
                    turn.act()
                    watch.lap("turn")
                    times[name].append(watch.read()["turn"] / turn.steps)
            progress(name, done * len(turns) + index + 1, rounds * len(turns))
    return {name: Turns(values[1:], peaks[name]) for name, values in times.items()}
