"""Variants on views made by hand: the same as the methods bit for bit, each choice by its formula, and refusals."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import references
from atedm.lab.ablation import Variant, variant_of
from atedm.lab.ablation.choosing import Remembered
from atedm.lab.ablation.controls import cells, facility_location, important_of_cells, uniform_random
from atedm.lab.ablation.map_modes import HEAD_FUSIONS, MAP_MODES
from atedm.lab.ablation.mappings import MAPPINGS
from atedm.lab.ablation.recoveries import bicubic_interpolation, zero_padding
from atedm.lab.ablation.settings import MATCHES, PLACES, RANKS, REFILLS, SCHEDULES
from atedm.method.at_edm import DAGGER, TURBO, AtEdm
from atedm.method.contract import Cut, Memory, Method, View
from atedm.method.cover import lattice, representative
from atedm.method.keep import gather_tokens, keep_count
from atedm.method.matched import Matched
from atedm.method.places import not_second_level
from atedm.method.presets import method_from_dict
from atedm.method.recovery import direct_copy
from atedm.method.schedule import PAIRINGS, Early
from views import SDXL, after_layers, view_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1), (4, 6), (7, 9), (32, 32), (33, 32)]  # up to 1,024 tokens and above

METHODS = {
    "paper": AtEdm(),
    "whole map": AtEdm(sample=None, iterations=5),
    "few rows": AtEdm(sample=20),
    "dagger": DAGGER,
    "turbo": TURBO,
    "other pairing": AtEdm(rate=0.4, spare=Early(0.5, "L-M")),
    "matched": Matched(),
    "matched, forgetting": Matched(own_update_share=0.0),
    "matched, all cover": Matched(0.5, not_second_level, ((1, 0.3), (3, 0.9)), cover_share=1.0, own_update_share=1.0),
}


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


# --- bit for bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_variant_of_a_method_does_the_same(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Over three steps, so that what is remembered is the same too."""
    batch, heads = (1, 1) if size[0] > 30 else (2, 3)
    methods: list[Method] = [METHODS[name], variant_of(METHODS[name])]
    assert isinstance(methods[1], Variant)
    filled: list[list[Tensor]] = [[], []]
    cuts: list[list[Cut]] = [[], []]
    for method, cuts_of, filled_of in zip(methods, cuts, filled, strict=True):
        memory = Memory()
        for step in range(3):
            memory.begin_step(follows=step > 0)
            view = view_of(size, batch=batch, heads=heads, dtype=dtype, step=step, seed=step, memory=memory)
            cut = method.drop(view)
            cuts_of.append(cut)
            filled_of.append(cut.refill(after_layers(cut.tokens, step)))
    for one, other in zip(*cuts, strict=True):
        assert same(one.tokens, other.tokens)
        assert same(one.keep, other.keep)
        assert same(one.importance, other.importance)
        assert same(one.weights, other.weights)
    assert all(same(one, other) for one, other in zip(*filled, strict=True))
    assert all(one.shape == (batch, size[0] * size[1], 8) and one.isfinite().all() for one in filled[0])


@pytest.mark.parametrize("name", METHODS)
def test_protected_tokens_and_counts_and_phases_are_the_same_too(name: str) -> None:
    method, variant = METHODS[name], variant_of(METHODS[name])
    protected = (torch.arange(63) % 7 == 0).float()
    one, other = (method_.drop(view_of((7, 9), protected=protected)) for method_ in (method, variant))
    assert same(one.keep, other.keep)
    assert same(one.importance, other.importance)
    assert {i for i in range(63) if protected[i]} <= set(one.keep[0].tolist())
    for place, early, tokens in itertools.product(SDXL, (True, False), (1, 64, 1000, 4096)):
        assert method.count(place, tokens, early=early) == variant.count(place, tokens, early=early)
        one_layer = dataclasses.replace(place, layers=1)
        assert method.count(one_layer, tokens, early=early) == variant.count(one_layer, tokens, early=early)
    shares = [i / 50 for i in range(50)]
    assert [method.is_early(share) for share in shares] == [variant.is_early(share) for share in shares]
    assert (method.dense_layers, method.remembers, method.rate) == (
        variant.dense_layers,
        variant.remembers,
        variant.rate,
    )


def test_a_variant_is_its_own_and_what_has_functions_of_ones_own_is_none() -> None:
    variant = Variant(rank="lattice")
    assert variant_of(variant) is variant
    assert variant_of(AtEdm()) == Variant()
    for method in (AtEdm(rank=len), AtEdm(refill=len)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="without functions of one's own"):
            variant_of(method)

    class Mine(Early):
        pass

    with pytest.raises(ValueError, match="no schedule of one's own"):
        variant_of(AtEdm(spare=Mine()))
    with pytest.raises(ValueError, match="an AtEdm or a Matched"):
        variant_of("paper")  # type: ignore[arg-type]


# --- everything that goes together ------------------------------------------------------------------------------------


def combinations() -> Iterator[Variant]:
    """Every rank, refill and match, with and without what goes with some of them alone."""
    extras: list[dict[str, Any]] = [{}, {"counts": True}, {"merge": True, "counts": True, "own_update_share": 0.5}]
    for rank, refill, match, extra in itertools.product(RANKS, REFILLS, MATCHES, extras):
        try:
            yield Variant(rank=rank, refill=refill, match=match, **extra)
        except ValueError:
            assert extra, "a rank, a refill and a match go together always"


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_refill_and_match_gives_finite_tokens(rank: str) -> None:
    number = 0
    for variant in combinations():
        if variant.rank != rank:
            continue
        number += 1
        for dtype in (torch.float32, torch.bfloat16):
            memory = Memory()
            for step in (0, 1):
                memory.begin_step(follows=step > 0)
                view = view_of((3, 5), dtype=dtype, step=step, seed=step, memory=memory)
                cut = variant.drop(view)
                assert cut.keep.shape == (2, view.count)
                assert cut.importance.shape == (2, 15)
                assert (cut.weights is not None) == variant.counts
                filled = cut.refill(after_layers(cut.tokens))
                assert filled.shape == view.tokens.shape
                assert filled.dtype == dtype
                assert filled.isfinite().all(), variant
    assert number == len(MATCHES) * (len(REFILLS) + 2 + 1)  # counts with two of them, merge with one


@pytest.mark.parametrize("mode", MAP_MODES)
@pytest.mark.parametrize("fusion", HEAD_FUSIONS)
def test_every_way_to_the_map_gives_finite_tokens(mode: str, fusion: str) -> None:
    if mode == "triton":
        pytest.importorskip("triton")
    device = "cuda" if mode == "triton" and torch.cuda.is_available() else "cpu"
    for rank in ("self-attention", "self-attention-reversed", "important-of-cells", "uniform-random"):
        view = view_of((4, 6), device=device)
        cut = Variant(rank=rank, map_mode=mode, head_fusion=fusion, sampled_rows=9).drop(view)
        assert cut.refill(after_layers(cut.tokens)).isfinite().all()


# --- each by its formula ----------------------------------------------------------------------------------------------


def importance(view: View, **changes: Any) -> Tensor:
    return Variant(**changes).drop(view).importance


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_words_rank_by_their_mapping(mapping: str) -> None:
    view = view_of((3, 4))
    expected = references.over_batch(references.importance, *view.cross_attention(), mapping, "rms", 3)
    found = importance(view, rank=f"cross-attention-{mapping}")
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", HEAD_FUSIONS)
@pytest.mark.parametrize("iterations", [1, 4])
def test_heads_are_fused_after_ranking_or_before(fusion: str, iterations: int) -> None:
    view = view_of((3, 4))
    expected = references.over_batch(
        references.importance, *view.self_attention(), "self-attention", fusion, iterations
    )
    found = importance(view, head_fusion=fusion, iterations=iterations)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-4, atol=1e-6)
    back = importance(view, rank="self-attention-reversed", head_fusion=fusion, iterations=iterations)
    assert torch.equal(back, -found)


def test_the_controls_are_what_they_say() -> None:
    view = view_of((4, 6), step=5)
    mean_map = references.over_batch(references.mean_attention_map, *view.self_attention())
    received = importance(view, rank="attention-received")
    torch.testing.assert_close(received, mean_map.mean(1), check_dtype=False, rtol=1e-5, atol=1e-7)
    assert torch.equal(importance(view, rank="uniform-random"), uniform_random(2, 24, seed=0, step=5))
    assert torch.equal(importance(view, rank="lattice"), lattice((4, 6), step=5).expand(2, -1))
    assert torch.equal(importance(view, rank="cells"), cells((4, 6), step=5).expand(2, -1))
    best = important_of_cells(importance(view), (4, 6))
    assert torch.equal(importance(view, rank="important-of-cells"), best)
    assert torch.equal(importance(view, rank="facility-location"), facility_location(view.tokens, view.count))
    cover = lattice((4, 6), step=5)
    for match in MATCHES:
        features = functional.normalize(view.tokens, dim=-1) if match == "cosine" else view.tokens
        expected = representative(features, cover, view.count, 0.6)
        assert torch.equal(importance(view, rank="representative", match=match, cover_share=0.6), expected)


@pytest.mark.parametrize("match", MATCHES)
def test_a_dropped_token_takes_from_its_match(match: str) -> None:
    view = view_of((5, 6))
    cut = Variant(match=match).drop(view)
    if match == "attention":
        mean_map = references.over_batch(references.mean_attention_map, *view.self_attention())
        source = references.over_batch(references.attention_source, mean_map, cut.keep)
    else:
        by = references.nearest_source if match == "euclidean" else references.cosine_source
        source = references.over_batch(by, view.tokens, cut.keep)
    kept = after_layers(cut.tokens)
    assert torch.equal(cut.refill(kept), gather_tokens(kept, source))
    updated = Variant(match=match, refill="matched-update", counts=True).drop(view)
    assert torch.equal(updated.tokens, gather_tokens(view.tokens, cut.keep))  # nothing is merged
    assert updated.weights is not None
    assert updated.weights.tolist() == [[row.count(k) for k in range(view.count)] for row in source.tolist()]
    expected = references.over_batch(references.matched_update, kept, updated.tokens, view.tokens, source)
    torch.testing.assert_close(updated.refill(kept), expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    merged = Variant(match=match, refill="matched-update", merge=True).drop(view)
    means = references.over_batch(references.group_means, view.tokens, source, view.count)
    torch.testing.assert_close(merged.tokens, means, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert merged.weights is None


def test_cosine_ignores_length_and_survives_a_zero_token() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 100.0], [5.0, 1.0], [0.0, 0.0]]])
    view = dataclasses.replace(view_of((2, 2), 2, batch=1, channels=2), tokens=tokens)
    view = dataclasses.replace(view, protected=torch.tensor([1.0, 1.0, 0.0, 0.0]))  # these two are kept
    by = {match: Variant(match=match).drop(view) for match in ("euclidean", "cosine")}
    filled = {match: cut.refill(torch.tensor([[[10.0], [20.0]]])).flatten().tolist() for match, cut in by.items()}
    assert filled["cosine"] == [10, 20, 10, 10]  # a dot product would say the second for the third
    tokens[0, 2] = torch.tensor([40.0, 70.0])
    assert Variant(match="cosine").drop(view).refill(torch.tensor([[[1.0], [2.0]]]))[0, 2].item() == 2


def test_plain_refills() -> None:
    view = view_of((4, 6))
    kept = after_layers(Variant().drop(view).tokens)
    for refill, expected in {
        "zero-padding": lambda keep: zero_padding(kept, keep, 24),
        "bicubic": lambda keep: bicubic_interpolation(kept, keep, (4, 6)),
        "direct-copy": lambda keep: direct_copy(kept, keep, view.tokens),
    }.items():
        cut = Variant(refill=refill).drop(view)
        assert torch.equal(cut.refill(kept), expected(cut.keep))


def test_only_what_is_needed_of_attention_is_made() -> None:
    def needed(**changes: Any) -> tuple[bool, bool]:
        asked = []
        view = view_of()
        watched = dataclasses.replace(
            view,
            self_attention=lambda: asked.append("self") or view.self_attention(),  # type: ignore[func-returns-value]
            cross_attention=lambda: asked.append("words") or view.cross_attention(),  # type: ignore[func-returns-value]
        )
        Variant(**changes).drop(watched)
        return "self" in asked, "words" in asked

    assert needed() == (True, False)
    assert needed(rank="uniform-random") == (True, False)
    assert needed(rank="uniform-random", match="cosine") == (False, False)
    assert needed(rank="lattice", refill="bicubic") == (False, False)
    assert needed(rank="attention-received", refill="zero-padding") == (True, False)
    assert needed(rank="cross-attention-power", refill="direct-copy") == (False, True)
    assert needed(rank="cross-attention-power") == (True, True)
    assert needed(rank="representative", refill="matched-update", match="euclidean") == (False, False)


def test_own_updates_and_choices_share_one_memory() -> None:
    memory = Memory()
    memory.store(Remembered(choices={0: None}, age=4))  # type: ignore[dict-item]
    memory.begin_step(follows=True)
    cut = Variant(refill="matched-update", match="euclidean", own_update_share=0.5).drop(view_of(memory=memory))
    cut.refill(cut.tokens)
    assert memory.last.updates.shape == (2, 24, 8)
    assert (memory.last.choices, memory.last.age) == ({0: None}, 4)


# --- how many, where and when -----------------------------------------------------------------------------------------


def test_several_drops_are_shares_of_what_reaches_them() -> None:
    variant = Variant(gradual=((0, 0.2), (2, 0.5)))
    assert variant.drops == ((0, 0.2), (2, 0.5))
    assert variant.counts_by_layer(SDXL[2], 1000) == {0: 800, 2: 400}
    assert variant.count(SDXL[2], 1000) == 400
    assert variant.count(SDXL[2], 1000, early=True) == 1000
    assert variant.counts_by_layer(dataclasses.replace(SDXL[2], layers=3), 1000) == {0: 800}
    for place in PLACES[1:]:  # after which something runs in the last layer too
        inside = dataclasses.replace(variant, place=place)
        assert inside.counts_by_layer(dataclasses.replace(SDXL[2], layers=3), 1000) == {0: 800, 2: 400}
    assert Variant(gradual=[[1, 0.5]]).gradual == ((1, 0.5),)  # type: ignore[arg-type,list-item]
    assert Variant(rate=0.5).drops == ((0, 0.5),)
    assert Variant(rate=0.0).counts_by_layer(SDXL[2], 1000) == {}


@pytest.mark.parametrize("place", PLACES)
def test_layers_before_the_drop(place: str) -> None:
    assert Variant(place=place).dense_layers == int(place == "after-feed-forward")
    assert Variant(place=place, gradual=((2, 0.5),)).dense_layers == 2 + int(place == "after-feed-forward")


def test_schedules_are_the_papers_its_mirror_and_none() -> None:
    early = {name: [Variant(schedule=name).is_early(i / 50) for i in range(50)] for name in SCHEDULES}
    assert early["prune-less-early"] == [True] * 15 + [False] * 35
    assert early["prune-more-early"] == [False] * 15 + [True] * 35
    assert early["constant"] == [False] * 50
    assert Variant(early_share=0.5).is_early(0.4)
    spared = {
        pairing: frozenset(p.name for p in SDXL if Variant(pairing=pairing).count(p, 100, early=True) == 100)
        for pairing in PAIRINGS
    }
    assert len(set(spared.values())) == 6
    assert spared["F-L"] == {"down.1.0", "down.2.0", "up.0.2", "up.1.2"}


def test_factors_of_levels_multiply_every_rate() -> None:
    variant = Variant(rate=0.5, level_factors=((2, 0.4),), where=not_second_level)
    assert variant.count(SDXL[0], 1000) == 1000
    assert variant.count(SDXL[2], 1000) == 500
    everywhere = dataclasses.replace(Variant(rate=0.5), level_factors=((2, 0.4),))
    assert everywhere.count(SDXL[0], 1000) == keep_count(1000, 0.2)


def test_a_variant_is_a_method_with_json_values_that_are_not_read_back() -> None:
    variant = Variant(gradual=((0, 0.2), (1, 0.3)), level_factors=((2, 0.5),), where=not_second_level)
    assert isinstance(variant, Method)
    assert hash(variant) == hash(dataclasses.replace(variant))
    values = json.loads(json.dumps(variant.as_dict()))
    assert values["where"] == "not-second-level"
    assert values["gradual"] == [[0, 0.2], [1, 0.3]]
    assert values.keys() - {"method"} == {field.name for field in dataclasses.fields(Variant)}
    with pytest.raises(ValueError, match="not 'variant'"):
        method_from_dict(values)
    assert [variant_of(method).name for method in (AtEdm(), Matched())] == ["AT-EDM variant", "matched variant"]


def test_it_remembers_updates_or_choices() -> None:
    assert not Variant().remembers
    assert Variant(refresh_every=2).remembers
    assert Variant(refill="matched-update", own_update_share=0.1).remembers


# --- what it refuses --------------------------------------------------------------------------------------------------

WHOLE_GRID = "several drops a block go with rankings by attention or chance, and plain refills only"
TWICE: dict[str, Any] = {"gradual": ((0, 0.3), (1, 0.4))}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"merge": True}, "merge and own_update_share go with refill 'matched-update', not with 'similarity-copy'"),
        ({"own_update_share": 0.5, "refill": "bicubic"}, "go with refill 'matched-update', not with 'bicubic'"),
        ({"counts": True, "refill": "direct-copy"}, "counts needs matches, which refill 'direct-copy' does without"),
        *[
            (TWICE | {"rank": rank}, WHOLE_GRID)
            for rank in ("lattice", "cells", "important-of-cells", "representative", "facility-location")
        ],
        (TWICE | {"refill": "bicubic"}, WHOLE_GRID),
        (TWICE | {"refill": "matched-update"}, WHOLE_GRID),
        (TWICE | {"counts": True}, WHOLE_GRID),
        ({"gradual": 0.5}, "gradual must be (layer, rate) pairs, not 0.5"),
        ({"gradual": (0, 0.5)}, "gradual must be (layer, rate) pairs, not (0, 0.5)"),
        ({"gradual": ((-1, 0.5),)}, "a layer of gradual must be a whole number of at least 0, not -1"),
        ({"gradual": ((True, 0.5),)}, "a layer of gradual must be a whole number of at least 0, not True"),
        ({"gradual": ((0, 1.0),)}, "a rate of gradual must be in [0, 1)"),
        ({"gradual": ((1, 0.5), (0, 0.5))}, "the layers of gradual must ascend, each once"),
        ({"gradual": ((1, 0.5), (1, 0.5))}, "the layers of gradual must ascend, each once"),
        ({"level_factors": ((3, 0.5), (2, 0.5))}, "the levels of level_factors must ascend"),
        ({"rate": 1.0}, "rate must be in [0, 1), the share of tokens to drop, not 1.0"),
        ({"where": "everywhere"}, "where must be a predicate of a Place, not 'everywhere'"),
        ({"cover_share": 1.5}, "cover_share must be in [0, 1], not 1.5"),
        ({"own_update_share": -1}, "own_update_share must be in [0, 1], not -1"),
        ({"early_share": 2}, "share must be in [0, 1], not 2"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, not 0"),
        ({"sampled_rows": 0}, "sampled_rows must be a whole number of at least 1, not 0"),
        ({"refresh_every": 1.5}, "refresh_every must be a whole number of at least 1, not 1.5"),
        ({"merge": 1}, "merge must be true or false, not 1"),
        ({"counts": "no"}, "counts must be true or false, not 'no'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^.*{re.escape(said)}"):
        Variant(**changes)


@pytest.mark.parametrize(
    ("field", "typo", "nearest", "known"),
    [
        ("rank", "selfattention", "self-attention", RANKS),
        ("head_fusion", "mean", "mean-map", HEAD_FUSIONS),
        ("map_mode", "block", "blocked", MAP_MODES),
        ("refill", "similarity", "similarity-copy", REFILLS),
        ("match", "cos", "cosine", MATCHES),
        ("place", "after-ff", "after-feed-forward", PLACES),
        ("schedule", "prune-less", "prune-less-early", SCHEDULES),
        ("pairing", "F-LL", "F-L", PAIRINGS),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_known(
    field: str, typo: str, nearest: str, known: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"^unknown {field} '{typo}'; did you mean '{nearest}'\?") as caught:
        Variant(**{field: typo})  # type: ignore[arg-type]
    assert all(repr(name) in str(caught.value) for name in known)
    for name in known:
        assert getattr(Variant(**{field: name}), field) == name  # type: ignore[arg-type]
