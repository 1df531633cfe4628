"""Settings of methods: what they are, how they are stored and read back, and what is refused with which sentence."""

import dataclasses
import functools
import json
import math
import pickle
import re
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atedm.method.at_edm import DAGGER, TURBO, AtEdm
from atedm.method.contract import Memory, Method, Place
from atedm.method.matched import Matched
from atedm.method.places import WHERES, everywhere, not_second_level, only_second_level, where_name
from atedm.method.presets import DEFAULT, METHODS, method_from_dict, method_named
from atedm.method.schedule import PAIRINGS, Early
from atedm.words import check_callable, check_name, check_pairs, check_whole, is_number, is_whole
from views import SDXL

CLASSES = [AtEdm, Matched]
MATCHED = Matched().as_dict()


def by_norm(view: Any) -> Any:
    return view.tokens.norm(dim=-1)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_names_of_methods() -> None:
    assert {"matched": Matched(), "paper": AtEdm(), "dagger": DAGGER, "turbo": TURBO} == METHODS
    assert {name: method.name for name, method in METHODS.items()} == {
        "matched": "Matched pruning",
        "paper": "AT-EDM",
        "dagger": "AT-EDM†",
        "turbo": "AT-EDM†",
    }
    assert all(method_named(name) is method for name, method in METHODS.items())
    assert METHODS[DEFAULT] == Matched()


def test_every_method_satisfies_the_contract_and_has_few_fields() -> None:
    for method in METHODS.values():
        assert isinstance(method, Method)
        assert len(dataclasses.fields(method)) <= 10  # type: ignore[arg-type]


def test_dagger_spares_the_second_level_and_turbo_does_so_in_every_step() -> None:
    assert AtEdm(where=not_second_level) == DAGGER
    assert AtEdm(where=not_second_level, spare=None) == TURBO


def test_predicates_of_places() -> None:
    levels = {
        everywhere: [True, True, True],
        not_second_level: [True, False, True],
        only_second_level: [False, True, False],
    }
    for where, expected in levels.items():
        assert [where(dataclasses.replace(SDXL[0], level=level)) for level in (1, 2, 3)] == expected
    assert set(WHERES.values()) == set(levels)


@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_frozen_hashable_and_picklable(kind: type[Any]) -> None:
    method = kind(rate=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.rate = 0.1
    assert hash(method) == hash(kind(rate=0.5))
    assert pickle.loads(pickle.dumps(method)) == method
    assert dataclasses.replace(method, rate=0.2) == kind(rate=0.2)
    with pytest.raises(ValueError, match=r"^rate must be"):
        dataclasses.replace(method, rate=1.5)


def test_pairs_read_from_json_are_those_that_were_written() -> None:
    assert Matched(level_factors=[[1, 0.5], [2, 1]]).level_factors == ((1, 0.5), (2, 1))  # type: ignore[arg-type]


@given(st.floats(min_value=0, max_value=1, exclude_max=True))
def test_any_rate_in_zero_to_one_is_taken(rate: float) -> None:
    for kind in CLASSES:
        assert kind(rate=rate).rate == rate


# --- stored and read back ---------------------------------------------------------------------------------------------

STORED = [
    *METHODS.values(),
    AtEdm(rate=0.4, where=only_second_level, spare=Early(0.5, "L-F"), sample=None, iterations=5),
    Matched(rate=0.0, where=not_second_level, level_factors=(), cover_share=1.0, own_update_share=0),
    Matched(level_factors=((1, 0.2), (3, 0.9))),
]


@pytest.mark.parametrize("method", STORED)
def test_as_dict_is_json_and_makes_the_method_again(method: Any) -> None:
    values = json.loads(json.dumps(method.as_dict()))
    assert values["method"] == ("matched" if isinstance(method, Matched) else "at-edm")
    fields = {field.name for field in dataclasses.fields(method)} - {"correction"}  # which is a file of its own
    assert values.keys() - {"method"} == fields
    again = method_from_dict(values)
    assert again == method
    assert type(again) is type(method)


def test_what_was_left_out_is_as_by_default() -> None:
    assert method_from_dict({"method": "at-edm"}) == AtEdm()
    assert method_from_dict({"method": "matched", "rate": 0.2}) == Matched(rate=0.2)


def test_functions_of_ones_own_are_named_and_none_is_copied() -> None:
    class Ranks:
        def __init__(self) -> None:
            self.lock = threading.Lock()  # which cannot be copied

        def __call__(self, view: Any) -> Any:
            return view

    where = functools.partial(lambda lock, place: True, threading.Lock())
    values = json.loads(json.dumps(AtEdm(rank=Ranks(), refill=by_norm, where=where).as_dict()))
    assert "Ranks" in values["rank"]
    assert values["refill"] == f"{__name__}.by_norm"
    assert values["where"].startswith("functools.partial(")
    assert where_name(not_second_level) == "not-second-level"
    assert where_name(lambda place: True).endswith("<lambda>")


class Middle:
    def is_early(self, share: float) -> bool:
        return 1 / 3 <= share < 2 / 3

    def spares(self, place: Place) -> bool:
        return place.stage == "mid"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AtEdm(rank=by_norm), "rank must be a function"),
        (AtEdm(refill=by_norm), "refill must be a function"),
        (AtEdm(where=lambda place: True), "unknown where"),
        (Matched(where=lambda place: True), "unknown where"),
        (AtEdm(spare=Middle()), "spare must be an Early or None"),  # type: ignore[arg-type]
    ],
    ids=["rank", "refill", "where", "where of matched", "spare"],
)
def test_functions_of_ones_own_are_not_read_back(method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from_dict(json.loads(json.dumps(method.as_dict())))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "method must be one of 'at-edm', 'matched', not None"),
        ({"method": "variant", "rate": 0.5}, "method must be one of 'at-edm', 'matched', not 'variant'"),
        ({"method": ["at-edm"]}, "method must be one of 'at-edm', 'matched', not ['at-edm']"),
        ({"method": "matched", "merge": True}, "Matched has no field 'merge'; it may be from another version of atedm"),
        ({"method": "at-edm", "where": "not-second-levels"}, "did you mean 'not-second-level'?"),
        ({"method": "at-edm", "where": ["everywhere"]}, "unknown where ['everywhere']"),
        ({"method": "at-edm", "spare": {"share": 0.3, "pair": "F-L"}}, "Early has no field 'pair'"),
        ({"method": "at-edm", "spare": {"pairing": "F-LL"}}, "did you mean 'F-L'?"),
        ({"method": "at-edm", "spare": 0.3}, "spare must be an Early or None, not 0.3"),
        ({"method": "at-edm", "rate": 2}, "rate must be in [0, 1)"),
        ({"method": "at-edm", "rate": None}, "rate must be in [0, 1)"),
        ({"method": "matched", "level_factors": 3}, "level_factors must be (level, factor) pairs, not 3"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_with_the_reason(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        method_from_dict(values)


def test_reading_changes_nothing_in_what_is_read() -> None:
    values = AtEdm().as_dict()
    before = json.dumps(values)
    method_from_dict(values)
    assert json.dumps(values) == before


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 1.5, math.nan, math.inf, -math.inf, "0.5", None, True, 0.5j])
def test_a_rate_outside_zero_to_one_is_refused(kind: type[Any], rate: Any) -> None:
    said = rf"^rate must be in \[0, 1\), the share of tokens to drop, not {re.escape(repr(rate))}$"
    with pytest.raises(ValueError, match=said):
        kind(rate=rate)


@pytest.mark.parametrize(
    ("kind", "field", "wrong"),
    [
        (AtEdm, "where", [3, None, "not-second-level"]),
        (AtEdm, "spare", ["F-L", 0.3, everywhere]),
        (AtEdm, "rank", [3, "self-attention"]),
        (AtEdm, "refill", [3, "zero-padding"]),
        (AtEdm, "sample", [0, -1, 1.5, True, "256"]),
        (AtEdm, "iterations", [0, -1, 1.5, True, "3", None]),
        (Matched, "where", [3, None, "everywhere"]),
        (Matched, "cover_share", [-0.1, 1.1, math.nan, None, True]),
        (Matched, "own_update_share", [-0.1, 1.1, math.nan, None, True]),
        (Matched, "dense_share", [-0.1, 1.1, math.nan, None, True]),
        (Matched, "level_factors", [0.5, None, (2, 0.5), ((2, 0.5, 1),)]),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(kind: type[Any], field: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{field} must be .* not {re.escape(repr(value))}$"):
            kind(**{field: value})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((0, 0.5),), "a level of level_factors must be a whole number of at least 1, not 0"),
        (((True, 0.5),), "a level of level_factors must be a whole number of at least 1, not True"),
        (((1.0, 0.5),), "a level of level_factors must be a whole number of at least 1, not 1.0"),
        (((3, 0.5), (2, 0.5)), "the levels of level_factors must ascend, each once"),
        (((2, 0.5), (2, 0.5)), "the levels of level_factors must ascend, each once"),
        (((2, 1.5),), "a factor of level_factors must be in [0, 1], not 1.5"),
    ],
)
def test_factors_of_levels_must_be_ascending_pairs(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Matched(level_factors=pairs)


@pytest.mark.parametrize(
    ("call", "what", "typo", "nearest", "known"),
    [
        (method_named, "method", "papre", "paper", METHODS),
        (method_named, "method", "matched-deep", "matched", METHODS),
        (lambda name: Early(pairing=name), "pairing", "F-LL", "F-L", PAIRINGS),
        (
            lambda name: method_from_dict({"method": "matched", "where": name}),
            "where",
            "everywere",
            "everywhere",
            WHERES,
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_known(
    call: Any, what: str, typo: str, nearest: str, known: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^unknown {what} '{typo}'; did you mean '{nearest}'\?") as caught:
        call(typo)
    assert all(repr(name) in str(caught.value) for name in known)
    for name in known:
        call(name)


# --- words ------------------------------------------------------------------------------------------------------------


def test_check_name_takes_anything() -> None:
    for name in (None, 3, ["paper"]):
        with pytest.raises(ValueError, match="unknown method"):
            check_name("method", name, METHODS)


def test_truth_is_no_number() -> None:
    assert [is_whole(value) for value in (3, 0, -1, True, 3.0, "3", None)] == [True] * 3 + [False] * 4
    assert [is_number(value) for value in (3, 0.5, True, math.nan, math.inf, "3", None)] == [True] * 2 + [False] * 5


def test_each_check_lets_pass_what_is_right() -> None:
    check_whole("n", 0, least=0)
    check_callable("f", len, "a function")
    assert check_pairs("pairs", [[1, 0], (4, 1.0)]) == ((1, 0), (4, 1.0))
    assert check_pairs("pairs", ()) == ()


# --- places and memory ------------------------------------------------------------------------------------------------


def test_memory_holds_the_last_step_of_a_run_and_is_not_copied() -> None:
    memory = Memory()
    memory.begin_step(follows=False)
    memory.store("a")
    assert (memory.last, memory.is_new) == ("a", True)
    memory.begin_step(follows=True)
    assert (memory.last, memory.is_new) == ("a", False)
    assert pickle.loads(pickle.dumps(memory)) == Memory()
    memory.begin_step(follows=True)  # nothing was stored in the step between
    assert memory.last is None
    memory.store("b")
    memory.begin_step(follows=False)
    assert memory.last is None
