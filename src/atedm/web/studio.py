"""What stands behind the page: models, limits, who is drawing, and how what was asked becomes a request."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atedm.choices import check_name, draws_in_few_steps
from atedm.config import PruningConfig, preset
from atedm.costs.fit import mean_share
from atedm.patching.survey import find_blocks, find_unet
from atedm.pipelines import Habits, habits, load_pipeline
from atedm.request import Request
from atedm.web.job import Event, run_job

MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_PROMPT = 1000
"""Characters."""
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class CostRange:
    """What the slider offers: whole percents of the dense arithmetic."""

    #: At nine tenths of the tokens dropped.
    lowest: int
    #: At one twentieth, but less than dense.
    highest: int
    #: Of the preset as it is.
    usual: int


@dataclass
class Studio:
    """Models by the names that were given when the page was opened, and nothing else."""

    models: tuple[str, ...]
    folder: Path
    device: str | None = None
    _pipes: dict[str, Any] = field(default_factory=dict)
    #: Held while a pipeline is opened or draws: one image at a time, the others wait in the page's queue.
    _busy: threading.Lock = field(default_factory=threading.Lock)
    #: The stop of every running job, by whose it is.
    _running: dict[str, threading.Event] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def habits(self, model: str) -> Habits:
        """Return what suits a model.

        Raises:
            ValueError: If the page was not opened with it.
        """
        check_name("model", model, self.models)
        return habits(model)

    def methods(self, model: str) -> dict[str, str]:
        """Presets that make sense for a model, by what the page calls them, the first one the default."""
        few = draws_in_few_steps(model)
        named = {"Matched, our own": "matched"}
        return named | ({"AT-EDM†": "turbo"} if few else {"AT-EDM†": "dagger", "AT-EDM, the paper's": "paper"})

    def cost_range(self, model: str, method: str, steps: int) -> CostRange:
        """Return the costs that a preset can be had at.

        Raises:
            TypeError: If the model has no U-Net.
            ValueError: If a name is unknown, the steps are out of their range, or the model has nothing to prune.
        """
        _check_range("Steps", steps, 1, MAX_STEPS)
        steps = int(steps)
        pipe, config = self.pipe(model), self._config(model, method)

        def percent(rate: float) -> float:
            return 100 * mean_share(pipe, config.replace(pruning_rate=rate), steps=steps)

        lowest, highest = math.ceil(percent(0.9)), min(math.floor(percent(0.05)), 99)
        return CostRange(lowest, highest, min(max(lowest, round(percent(config.pruning_rate))), highest))

    def pipe(self, model: str) -> Any:
        """Return a pipeline, opened when it is first asked for.

        Raises:
            ValueError: If the page was not opened with it, or it cannot be opened.
        """
        check_name("model", model, self.models)
        if model in self._pipes:  # without waiting for whoever draws
            return self._pipes[model]
        with self._busy:
            if model not in self._pipes:
                self._pipes.clear()  # one at a time: two large ones rarely fit
                self._pipes[model] = load_pipeline(model, device=self.device)
            return self._pipes[model]

    def _config(self, model: str, method: str) -> PruningConfig:
        """Return a preset, dropping inside the layer where blocks have but one."""
        check_name("method", method, self.methods(model).values())
        config = preset(method)
        one_layer = all(place.layers == 1 for place, _ in find_blocks(find_unet(self.pipe(model))).values())
        if one_layer and config.place == "after-feed-forward":
            return config.replace(place="after-self-attention")
        return config

    def request(
        self, model: str, prompt: str, method: str, cost: float, steps: int, guidance: float, seed: int
    ) -> Request:
        """Check what was asked, as the page's own limits are not to be trusted, and solve for the rate.

        Raises:
            ValueError: If something is out of its range; the message says what would work.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("The prompt is empty: write what to draw, or choose an example.")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT} are read.")
        _check_range("Steps", steps, 1, MAX_STEPS)
        _check_range("Guidance", guidance, 0, MAX_GUIDANCE)
        _check_range("The seed", seed, 0, MAX_SEED)
        offered = self.cost_range(model, method, int(steps))
        _check_range("The cost", cost, offered.lowest, offered.highest)
        config = self._config(model, method)
        if cost != offered.usual:
            config = PruningConfig.for_budget(self.pipe(model), share=cost / 100, config=config, steps=int(steps))
        return Request((prompt.strip(),), config, steps=int(steps), guidance=float(guidance), seed=int(seed))

    def draw(self, who: str, model: str, request: Request) -> Iterator[Event]:
        """Draw dense and pruned, and yield what happens.

        Raises:
            Stopped: If `stop` was called for the same ``who``.
        """
        pipe = self.pipe(model)
        stop = self._running[who] = threading.Event()
        job = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(self._numbers):03d}"
        try:
            with self._busy:
                yield from run_job(pipe, request, job, model, stop)
        finally:
            if self._running.get(who) is stop:
                del self._running[who]

    def stop(self, who: str) -> bool:
        """End what is being drawn for ``who``; whether there was anything."""
        stop = self._running.get(who)
        if stop is not None:
            stop.set()
        return stop is not None


def checked_models(models: Sequence[str]) -> tuple[str, ...]:
    """Return the names without repeats.

    Raises:
        ValueError: If there is none.
    """
    if not models:
        raise ValueError("name at least one model, such as tiny")
    return tuple(dict.fromkeys(models))


def _check_range(what: str, value: float, lowest: float, highest: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{what} must be from {lowest:.10g} to {highest:.10g}, not {value}.")
