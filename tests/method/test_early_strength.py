"""A method that is gentler in early steps."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

import atedm
from atedm.method.contract import Memory, Method, Place
from atedm.method.early_strength import EarlyStrength
from views import view_of

PLACE = Place("down", 3, 1, 2, 10, "here")
SPARED = Place("down", 3, 0, 2, 10, "spared")


@given(rate=st.floats(0, 0.95), strength=st.floats(0, 1), tokens=st.integers(1, 5000))
def test_early_steps_keep_what_the_method_keeps_at_a_part_of_its_rate(
    rate: float, strength: float, tokens: int
) -> None:
    method = EarlyStrength(atedm.Matched(rate), strength)
    assert method.count(PLACE, tokens) == atedm.Matched(rate).count(PLACE, tokens)
    assert method.count(PLACE, tokens, early=True) == atedm.Matched(strength * rate).count(PLACE, tokens)
    assert method.count(PLACE, tokens, early=True) >= method.count(PLACE, tokens)


def test_it_is_a_method_whose_rate_can_be_set() -> None:
    method = EarlyStrength(atedm.AtEdm(), 0.5)
    assert isinstance(method, Method)
    assert method.rate == 0.63
    gentler = replace(method, rate=0.4)
    assert gentler.method.rate == gentler.rate == 0.4
    assert method.as_dict() == atedm.AtEdm().as_dict() | {"early_strength": 0.5, "early_share": 0.3}
    assert (method.name, method.dense_layers, method.remembers) == ("AT-EDM", 1, False)


def test_what_the_method_spares_stays_spared() -> None:
    method = EarlyStrength(atedm.AtEdm(0.5), 1.0)
    assert method.count(SPARED, 100, early=True) == 100
    assert method.count(PLACE, 100, early=True) == 50
    early = [EarlyStrength(atedm.Matched(), 1.0).is_early(share) for share in (0.0, 0.29, 0.3, 0.9)]
    assert early == [True, True, False, False]


def test_it_drops_as_the_method_does() -> None:
    plain, gentle = (method.drop(view_of()) for method in (atedm.Matched(), EarlyStrength(atedm.Matched(), 0.5)))
    assert torch.equal(plain.keep, gentle.keep)
    assert torch.equal(plain.tokens, gentle.tokens)


def test_it_remembers_dense_steps_as_the_method_does() -> None:
    memory, none = Memory(), Memory()
    before = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    EarlyStrength(atedm.Matched(), 0.0).remember_dense(before, 3 * before, memory)
    torch.testing.assert_close(memory.last, 2 * before)
    EarlyStrength(atedm.AtEdm(), 0.0).remember_dense(before, 3 * before, none)
    assert not none.is_new
