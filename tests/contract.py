"""What holds for every host: whatever is done, in any order, pruned calls are those of a fresh patch.

Hypothesis makes up sequences of what people do to a model, on one that is patched and unpatched on the way and on a
twin that never is. `test_contract.py` and `test_dit_contract.py` say what a model of each host is.
`ATEDM_SEQUENCES=2000 pytest -n 0 -s tests/hosts/test_contract.py` runs more sequences than CI does, and says what was
done.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from peft import LoraConfig
from torch import Tensor, nn

import atedm
from atedm import AtEdm, Early, Matched
from atedm.hosts.models import find_model, spans_of
from atedm.method.contract import Method
from atedm.method.presets import METHODS, TRANSFORMER_METHODS
from models import snapshot

SEQUENCES = int(os.environ.get("ATEDM_SEQUENCES", "12"))
DONE: Counter[str] = Counter()
"""What was done, over the sequences of one host."""

RUNS = st.sampled_from([(999,), (1,), (999, 500, 1), (801, 601, 401, 201), (999, 1)])
"""Timesteps of runs. A host that knows steps by their noise takes those that start from all noise: see `known`."""
RATES = st.sampled_from([0.0, 0.2, 0.5, 0.63, 0.9])
SIZES = st.sampled_from([(16, 16), (8, 24), (10, 14), (20, 12)])
BATCHES = st.sampled_from([1, 2, 3])


def by_step(view: atedm.View) -> Tensor:
    """A ranking that is another one in every step."""
    return torch.sin(view.tokens.float().square().mean(-1) * (1 + view.step))


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """Return any method, some of it changed."""
    known = [*METHODS.values(), TRANSFORMER_METHODS["matched"]]
    method = replace(draw(st.sampled_from(known)), rate=draw(RATES))  # type: ignore[type-var]
    if isinstance(method, Matched):
        return replace(
            method,
            own_update_share=draw(st.sampled_from([0.0, 0.5])),
            cover_share=draw(st.sampled_from([0.0, 0.4, 1.0])),
        )
    assert isinstance(method, AtEdm)
    return replace(
        method,
        where=draw(st.sampled_from([method.where, atedm.everywhere])),
        spare=draw(st.sampled_from([None, Early(), Early(0.6, "L-M")])),
        rank=draw(st.sampled_from([None, by_step])),
        sample=draw(st.sampled_from([None, 256])),
    )


class Interrupted(BaseException):
    """Like Ctrl+C in the middle of a step."""


class Contract(RuleBasedStateMachine):
    """One model that all is done to, and its twin. What a host adds are `drawn` and `last_layer`, and more to do."""

    model: Any
    twin: Any
    method: Method | None

    # --- what a host says

    @staticmethod
    def drawn(model: Any, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> list[Tensor]:
        """Every step of a run."""
        raise NotImplementedError

    @staticmethod
    def last_layer(model: Any) -> nn.Module:
        """Something that runs when some of the spans have run and some have not, or are in the middle."""
        raise NotImplementedError

    @staticmethod
    def known(timesteps: tuple[int, ...]) -> tuple[int, ...]:
        """Return as much of a run as the host tells apart from the end of an unfinished one."""
        return timesteps

    def begin_with(self, model: Any, method: Method | None) -> None:
        self.model, self.twin = model, copy.deepcopy(model)
        self.method, self.loras = None, 0
        if method is not None:
            self.apply_or_be_refused(method)

    def note(self, what: str) -> None:
        DONE[what] += 1

    # --- on and off

    @precondition(lambda self: self.method is None)
    @rule(method=methods())
    def apply(self, method: Method) -> None:
        self.apply_or_be_refused(method)

    def apply_or_be_refused(self, method: Method) -> None:
        before = snapshot(self.model)
        half = replace(method, rate=0.5)  # type: ignore[type-var]
        if any(half.count(place, 100) < 100 for place in places(self.model)):
            atedm.apply(self.model, method)
            self.method = method
            self.note("apply")
            return
        with pytest.raises(ValueError, match="nothing to prune"):  # one layer a block, or none but the second level
            atedm.apply(self.model, method)
        assert snapshot(self.model) == before
        self.note("refused")

    @precondition(lambda self: self.method is not None)
    @rule()
    def remove(self) -> None:
        atedm.remove(self.model)
        self.method = None
        assert all("atedm" not in name for module in self.model.modules() for name in vars(module))
        assert {type(a) for a in self.model.modules()} == {type(a) for a in self.twin.modules()}
        self.note("remove")

    # --- use

    @rule(timesteps=RUNS, size=SIZES, batch=BATCHES)
    def draw(self, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> None:
        self.draws_as_a_fresh_one(timesteps, size, batch)

    @precondition(lambda self: self.method is not None)
    @rule(timesteps=RUNS, size=SIZES, batch=BATCHES)
    def draw_pruned(self, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> None:
        self.draws_as_a_fresh_one(timesteps, size, batch)

    def fresh(self) -> Any:
        """The untouched twin, patched just now if ours is."""
        fresh = copy.deepcopy(self.twin)
        if self.method is not None:
            atedm.apply(fresh, self.method)
        return fresh

    def draws_as_a_fresh_one(self, timesteps: tuple[int, ...], size: tuple[int, int], batch: int) -> None:
        timesteps = self.known(timesteps)
        ours, theirs = (self.drawn(model, timesteps, size, batch) for model in (self.model, self.fresh()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        self.note("draw pruned" if self.method is not None else "draw dense")

    @rule(error=st.sampled_from([ValueError("in the middle"), Interrupted()]), timesteps=RUNS)
    def raise_in_the_middle(self, error: BaseException, timesteps: tuple[int, ...]) -> None:
        with raising(self.last_layer(self.model), error), pytest.raises(type(error)):
            self.drawn(self.model, timesteps, (16, 16), 2)
        self.note("raise")

    @precondition(lambda self: self.method is not None)
    @rule(timesteps=RUNS)
    def look_on(self, timesteps: tuple[int, ...]) -> None:
        with atedm.recorded(self.model) as recording:
            self.drawn(self.model, timesteps, (16, 16), 2)
        assert recording.evaluations == len(timesteps)
        self.note("look on")

    @rule(size=SIZES)
    def leave_a_run_unfinished(self, size: tuple[int, int]) -> None:
        self.drawn(self.model, (999, 800, 600, 400, 200)[: 1 + size[0] % 3], size, 1)
        self.note("leave unfinished")

    # --- what else is done to models

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.note("copy")

    @precondition(lambda self: self.loras == 0)
    @rule()
    def pickle(self) -> None:
        file = io.BytesIO(pickle.dumps(self.model))
        self.model = pickle.load(file)
        self.note("pickle")

    @precondition(lambda self: self.loras < 2)
    @rule()
    def add_a_lora(self) -> None:
        for model in (self.model, self.twin):
            torch.manual_seed(self.loras)
            target = ["to_q", "to_k", "to_v"]
            model.add_adapter(LoraConfig(r=2, target_modules=target, init_lora_weights=False), f"lora{self.loras}")
            model.to(next(model.parameters()).dtype)
        self.loras += 1
        self.note("LoRA on")

    @precondition(lambda self: self.loras > 0)
    @rule(on=st.booleans())
    def switch_loras(self, on: bool) -> None:
        for model in (self.model, self.twin):
            model.enable_adapters() if on else model.disable_adapters()
        self.note("LoRA switched")

    # --- always

    @invariant()
    def no_weight_ever_changes(self) -> None:
        if hasattr(self, "model"):
            ours, theirs = self.model.state_dict(), self.twin.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.method is not None:
            atedm.remove(self.model)
        ours, theirs = (self.drawn(model, (999, 1), (16, 16), 2) for model in (self.model, self.twin))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        self.note("sequences")


def places(model: Any) -> list[Any]:
    """Places of all spans of a model."""
    return [place for place, _ in spans_of(find_model(model)).values()]


@contextmanager
def raising(layer: nn.Module, error: BaseException) -> Iterator[None]:
    """Raise before a layer runs."""

    def fail(*_: Any) -> None:
        raise error

    hook = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def case_of(machine: type[Contract]) -> Any:
    """Return the test case of a machine."""
    case = machine.TestCase
    case.settings = settings(
        max_examples=SEQUENCES,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=[*HealthCheck],
    )
    return case


@pytest.fixture(scope="module", autouse=True)
def said() -> Iterator[None]:
    """Say at the end what was done."""
    DONE.clear()
    yield
    print("\n" + ", ".join(f"{what}: {count}" for what, count in sorted(DONE.items())))
