"""Turns: every method once in every round, so that what slows the machine for a while slows all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import lcm
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atedm.costs.counting import flop_counter
from atedm.costs.memory_measured import peak_of
from atedm.costs.stopwatch import Stopwatch
from atedm.evaluation.methods import Caching, Dense, Method, Pruning, Stacked
from atedm.generate import Progress
from atedm.patching.twins import twin_of

_LATE = 9
"""Times as many steps are taken to lie before those that are timed, so that no schedule spares anything in them."""
_LONGEST_CYCLE = 10
"""A choice that is kept for more steps than these is known beforehand, for all that is timed."""


class Turns(NamedTuple):
    """What a method took."""

    #: Milliseconds of each round that counts.
    times: list[float]
    #: Bytes of activations at the highest point of one call more; None where they were not asked for.
    peak: int | None


#: One turn of a method: does what is timed.
Turn: TypeAlias = Callable[[], object]


def cycle_of(method: Method) -> int:
    """Steps after which what a method does comes round again: of caching its interval, of a kept choice how long."""
    if isinstance(method, Stacked):
        return lcm(*map(cycle_of, method.methods))
    if isinstance(method, Caching):
        return method.interval
    if isinstance(method, Pruning) and method.config.refresh_every <= _LONGEST_CYCLE:
        return method.config.refresh_every
    return 1


@torch.no_grad()
def steps_in_turns(
    unet: UNet2DConditionModel,
    call: dict[str, Any],
    methods: Mapping[str, Method],
    repeats: int,
    progress: Progress | None = None,
    *,
    memory: bool = False,
) -> dict[str, Turns]:
    """Time a call of the U-Net with each method, the mean over a cycle of those that work in cycles.

    Rounds are steps of a run, one after another, so that what a method remembers from step to step is at hand.

    Args:
        unet: Not patched; it is left so, each method has a twin on its weights.
        call: Its arguments but for the timestep.
        methods: By name.
        repeats: Rounds after the one to warm up.
        progress: Told of every method in every round.
        memory: Whether to measure the peak in one round more.
    """
    with ExitStack() as stack:
        turns: dict[str, tuple[Turn, int]] = {}
        for name, method in methods.items():
            cycle = cycle_of(method)
            rounds = cycle * (repeats + 1 + memory)
            run = stack.enter_context(run_of_steps(twin_of(unet), call, method, rounds, before=_LATE * rounds))
            turns[name] = (partial(_several, run, cycle), cycle)
        return _in_turns(turns, unet.device, repeats, progress, memory)


def images_in_turns(
    pipe: Any,
    call: Mapping[str, Any],
    methods: Mapping[str, Method],
    steps: int,
    repeats: int,
    progress: Progress | None = None,
    *,
    memory: bool = False,
) -> dict[str, Turns]:
    """Time whole images with each method, from words to pixels. Applying and removing are not part of it.

    Args:
        pipe: A pipeline, neither patched nor compiled.
        call: Its arguments but for the steps and the noise, which is that of seed 0 every time.
        methods: By name.
        steps: Denoising steps.
        repeats: Rounds after the one to warm up.
        progress: Told of every method in every round.
        memory: Whether to measure the peak in one round more.
    """

    def draw(method: Method) -> object:
        noise = torch.Generator("cpu").manual_seed(0)
        return pipe(**call, num_inference_steps=method.steps_of(steps), generator=noise)

    applied = {name: partial(method.applied, pipe) for name, method in methods.items()}
    turns = {name: (partial(draw, method), 1) for name, method in methods.items()}
    return _in_turns(turns, pipe.unet.device, repeats, progress, memory, applied)


@contextmanager
def run_of_steps(
    unet: UNet2DConditionModel, call: dict[str, Any], method: Method, steps: int, *, before: int = 0
) -> Iterator[Turn]:
    """Apply a method to a U-Net, and yield what takes the next step of a run.

    Args:
        unet: On any device.
        call: Its arguments but for the timestep.
        method: What is applied.
        steps: How many can be taken.
        before: How many steps the run is to have had before.
    """
    timesteps = torch.linspace(999, 0, before + steps)[before:]
    if unet.device.type != "meta":  # where their numbers would be lost
        timesteps = timesteps.to(unet.device)
    sample, words = call["sample"], {name: value for name, value in call.items() if name != "sample"}
    left: Iterator[Tensor] = iter(timesteps)
    scheduler = SimpleNamespace(timesteps=timesteps)  # DeepCache looks the step up there
    with method.applied(SimpleNamespace(unet=unet, scheduler=scheduler)):
        yield lambda: unet(sample, next(left), **words)  # tomesd looks for the sample among what has no name


@torch.no_grad()
def counted_share(unet: UNet2DConditionModel, call: dict[str, Any], method: Method, steps: int | None = None) -> float:
    """Share of the dense multiply-accumulates that a method takes, as torch counts them.

    Args:
        unet: On the meta device.
        call: Its arguments but for the timestep, there too.
        method: What is applied.
        steps: Of a whole run; None is the mean over a cycle of normal steps.
    """

    def count(of: Method, steps: int, before: int = 0) -> int:
        counter = flop_counter()
        with run_of_steps(unet, call, of, steps, before=before) as run, sdpa_kernel(SDPBackend.MATH), counter:
            _several(run, steps)
        return int(counter.get_total_flops())

    dense = count(Dense(), 1)
    if steps is None:
        cycle = cycle_of(method)
        return count(method, cycle, _LATE * cycle) / (cycle * dense)
    return count(method, method.steps_of(steps)) / (steps * dense)


def _several(run: Turn, times: int) -> None:
    for _ in range(times):
        run()


def _in_turns(
    turns: Mapping[str, tuple[Turn, int]],
    device: torch.device,
    repeats: int,
    progress: Progress | None,
    memory: bool,
    applied: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Turns]:
    """Take every turn once a round; its time is divided by what stands beside it."""
    rounds = repeats + 1 + memory
    times: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int | None] = dict.fromkeys(turns)
    for done in range(rounds):
        for index, (name, (turn, parts)) in enumerate(turns.items()):
            with ExitStack() as stack:
                if applied is not None:
                    stack.enter_context(applied[name]())
                if done > repeats:
                    peaks[name] = peak_of(turn, device)
                else:
                    watch = Stopwatch(device)
                    turn()
                    watch.lap("turn")
                    times[name].append(watch.read()["turn"] / parts)
            if progress is not None:
                progress(name, done * len(turns) + index + 1, rounds * len(turns))
    return {name: Turns(values[1:], peaks[name]) for name, values in times.items()}
