"""A fitted refill: what it knows, against loops in float64; and that it adds what its matrices say, when it may."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from atedm.method.contract import Memory, View
from atedm.method.correction import Correction, Refill
from atedm.method.matched import Matched
from atedm.method.matching import match_by_features
from views import SDXL, never, view_of

SPAN = SDXL[2].name


def refill_of(last: bool = True, step: Any = 2, seed: int = 0, kept: int = 3) -> Refill:
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.randn(2, count, 4, generator=generator, dtype=torch.float64)

    source = torch.cat([torch.arange(kept), torch.randint(kept, (7 - kept,), generator=generator)]).repeat(2, 1)
    return Refill(SPAN, step, some(7), some(kept), some(kept), source, some(7) if last else None)


def matrices(steps: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(steps, 16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("last", [True, False])
def test_what_is_known_is_the_tokens_own_and_its_groups(last: bool) -> None:
    refill = refill_of(last)
    own, groups = refill.known()
    for image in range(2):
        for group in range(3):
            members = [n for n in range(7) if refill.source[image, n] == group]
            mean = torch.zeros(4, dtype=torch.float64)
            if refill.last is not None:
                mean = sum(refill.last[image, n] for n in members) / len(members)
            update = refill.kept[image, group] - refill.start[image, group]
            torch.testing.assert_close(groups[image, group], torch.cat([update, mean]))
            for n in members:
                was = torch.zeros(4, dtype=torch.float64) if refill.last is None else refill.last[image, n]
                mine = torch.cat([refill.before[image, n] - refill.start[image, group], was - mean])
                torch.testing.assert_close(own[image, n], mine)


def test_the_matrix_of_the_step_is_applied_to_what_is_known() -> None:
    maps, refill = matrices(), refill_of()
    found = Correction({SPAN: maps})(refill)
    assert found is not None
    assert found[1] is True
    own, groups = refill.known()
    for image in range(2):
        for n in range(7):
            known = torch.cat([own[image, n], groups[image, refill.source[image, n]]])
            torch.testing.assert_close(found[0][image, n], known @ maps[2])


@pytest.mark.parametrize(
    ("last", "step", "holds"),
    [(True, 2, True), (True, 3, False), (False, 2, False), (False, 0, True), (True, 0, True), (True, 1, False)],
)
def test_a_step_that_was_not_fitted_or_has_another_memory_is_left_alone(last: bool, step: int, holds: bool) -> None:
    maps = matrices()
    maps[1] = 0
    assert (Correction({SPAN: maps})(refill_of(last, step)) is not None) == holds


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("step", range(5))
def test_compiled_it_is_the_same_with_the_step_as_a_tensor(
    last: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = matrices()
    maps[1] = 0
    eager = Correction({SPAN: maps})(refill_of(last, step))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = Correction({SPAN: maps})(refill_of(last, torch.tensor(step)))
    assert compiled is not None
    assert bool(compiled[1]) == (eager is not None)
    if eager is not None:
        torch.testing.assert_close(compiled[0], eager[0])


def test_other_spans_and_other_widths_are_left_alone() -> None:
    assert Correction({"another": matrices()})(refill_of()) is None
    assert Correction({SPAN: torch.randn(3, 8, 2)})(refill_of()) is None


def test_a_memory_of_zeros_is_none_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    empty = torch.zeros(2, 7, 4, dtype=torch.float64)
    for step, holds in ((0, True), (2, False)):
        found = Correction({SPAN: matrices()})(refill_of(step=torch.tensor(step))._replace(last=empty))
        assert found is not None
        assert bool(found[1]) == holds


@pytest.mark.parametrize("one", [torch.zeros(3, 16), torch.zeros(3, 15, 4), torch.zeros(3, 16, 4).long(), [1, 2]])
def test_what_is_no_matrices_is_refused(one: Any) -> None:
    with pytest.raises(ValueError, match=r"must be \(S, 4C, C\)"):
        Correction({SPAN: one})
    with pytest.raises(ValueError, match="correction must be what"):
        Matched(correction=5)  # type: ignore[arg-type]


# --- in matched pruning -----------------------------------------------------------------------------------------------


def view(step: int, memory: Memory) -> View:
    made = view_of((4, 4), 6, batch=1, channels=4, step=step, memory=memory)
    return dataclasses.replace(made, self_attention=never, cross_attention=never)


def refilled(method: Matched, view: View) -> Tensor:
    cut = method.drop(view)
    return cut.refill(cut.tokens.tanh())


def test_matched_pruning_adds_it_to_the_update_of_the_match_and_remembers_the_sum() -> None:
    plain, memory = Matched(own_update_share=0.5), Memory()
    fitted = dataclasses.replace(plain, correction=Correction({SPAN: matrices().float()}))
    last = torch.randn(1, 16, 4)
    memory.last = last
    here = view(2, memory)
    found = refilled(fitted, here)
    without_memory = refilled(dataclasses.replace(plain, own_update_share=0.0), here)
    stored = memory.last
    cut = plain.drop(here)
    source = match_by_features(here.tokens, cut.keep).source
    known = Refill(SPAN, 2, here.tokens, cut.tokens, cut.tokens.tanh(), source, last)
    added = Correction({SPAN: matrices().float()})(known)
    torch.testing.assert_close(found, without_memory + added[0])  # type: ignore[index]
    torch.testing.assert_close(here.tokens + stored, found)


def test_where_nothing_was_fitted_it_prunes_as_without() -> None:
    plain = Matched()
    fitted = dataclasses.replace(plain, correction=Correction({SPAN: matrices().float()}))
    first, second = Memory(last=torch.ones(1, 16, 4)), Memory(last=torch.ones(1, 16, 4))
    assert torch.equal(refilled(fitted, view(7, first)), refilled(plain, view(7, second)))
    assert fitted != plain
    assert "correction" not in fitted.as_dict()
