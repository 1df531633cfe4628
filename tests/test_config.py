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

from atedm.choices import PLACES, RANKINGS, RECOVERIES, SIMILARITIES, WHERES, check_name, draws_in_few_steps
from atedm.config import PRESETS, PruningConfig, preset
from atedm.ranking import HEAD_FUSIONS, MAPPINGS
from atedm.schedule import PAIRINGS, SCHEDULES, BlockPlace


def place(level: int) -> BlockPlace:
    return BlockPlace("down", level, 0, 1, 2, "down_blocks.0.attentions.0")


def block(layers: int, level: int = 1) -> BlockPlace:
    return BlockPlace("mid", level, 0, 1, layers, "mid_block.attentions.0")


# --- what it says -----------------------------------------------------------------------------------------------------


def test_defaults_are_the_paper_s_setting() -> None:
    config = PruningConfig()
    assert config == PRESETS["paper"] == preset("paper")
    assert config.rates == ((0, 0.63),)
    assert (config.place, config.ranking, config.recovery) == (
        "after-feed-forward",
        "self-attention",
        "similarity-copy",
    )
    assert (config.schedule, config.prune_less_share, config.unpruned_blocks) == ("prune-less-early", 0.3, "F-L")
    assert all(config.prunes(place(level)) for level in (1, 2, 3, 4))


def test_dagger_spares_the_second_level_and_turbo_does_so_in_every_step() -> None:
    for name in ("dagger", "turbo"):
        assert [preset(name).prunes(place(level)) for level in (1, 2, 3)] == [True, False, True]
    assert preset("dagger").schedule == "prune-less-early"
    assert preset("turbo").schedule == "constant"


def test_names_of_the_parts_agree_with_what_they_name() -> None:
    assert {f"cross-attention-{name}" for name in MAPPINGS if name != "self-attention"} < set(RANKINGS)


def test_pruning_rate_is_one_layer_and_gradual_replaces_it() -> None:
    assert PruningConfig(pruning_rate=0.5).rates == ((0, 0.5),)
    assert PruningConfig(gradual=[[0, 0.2], [3, 0.4]]).rates == ((0, 0.2), (3, 0.4))  # type: ignore[arg-type]


def test_in_a_block_only_layers_count_after_which_something_runs_on_fewer_tokens() -> None:
    config = PruningConfig(gradual=((0, 0.1), (1, 0.2), (3, 0.3)))
    assert config.rates_in(block(5)) == config.rates_in(block(9)) == config.rates == ((0, 0.1), (1, 0.2), (3, 0.3))
    assert config.rates_in(block(4)) == config.rates_in(block(3)) == ((0, 0.1), (1, 0.2))
    assert config.rates_in(block(1)) == ()
    for place in ("before-feed-forward", "after-self-attention"):
        assert config.replace(place=place).rates_in(block(4)) == config.rates
        assert config.replace(place=place).rates_in(block(1)) == ((0, 0.1),)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"ranking": "uniform-random"}, True),
        ({"ranking": "uniform-random", "similarity": "cosine"}, False),
        ({"ranking": "uniform-random", "recovery": "bicubic"}, False),
        ({"ranking": "attention-received", "recovery": "zero-padding"}, True),
        ({"ranking": "cross-attention-power", "recovery": "direct-copy"}, False),
        ({"recovery": "direct-copy"}, True),
        ({"ranking": "uniform-random", "copy_map": "first"}, False),
        ({"copy_map": "first"}, True),
        ({"ranking": "representative", "recovery": "matched-update", "similarity": "euclidean"}, False),
        ({"ranking": "lattice", "similarity": "distance", "importance_share": 0.1}, True),
        ({"ranking": "lattice", "recovery": "weighted-update"}, True),
    ],
)
def test_the_attention_map_is_asked_for_only_where_it_serves(changes: dict[str, Any], needed: bool) -> None:
    assert PruningConfig(**changes).needs_attention_map == needed


@pytest.mark.parametrize(
    ("changes", "opened"),
    [
        ({}, False),
        ({"ranking": "uniform-random"}, False),
        ({"ranking": "cross-attention-power"}, True),
        ({"place": "before-feed-forward"}, True),
        ({"place": "after-self-attention"}, True),
    ],
)
def test_a_layer_is_opened_only_where_something_happens_inside(changes: dict[str, Any], opened: bool) -> None:
    assert PruningConfig(**changes).opens_layer == opened


def test_where_may_be_a_predicate() -> None:
    config = PruningConfig(where=lambda block: block.level == 3)
    assert [config.prunes(place(level)) for level in (2, 3)] == [False, True]


def test_what_is_said_of_functions_copies_none_of_them() -> None:
    class Ranks:
        def __init__(self) -> None:
            self.lock = threading.Lock()  # which cannot be copied

        def __call__(self, to_rank: Any) -> Any:
            return to_rank

    config = PruningConfig(ranking=Ranks(), where=functools.partial(lambda lock, block: True, threading.Lock()))
    assert isinstance(json.dumps(config.as_dict()), str)
    assert "Ranks" in config.as_dict()["ranking"]


def test_replace_checks_like_a_new_one() -> None:
    config = PruningConfig().replace(pruning_rate=0.5, where="not-second-level")
    assert config == PruningConfig(pruning_rate=0.5, where="not-second-level")
    with pytest.raises(ValueError, match="pruning_rate"):
        config.replace(pruning_rate=1.5)
    with pytest.raises(ValueError, match=r"unknown field 'pruning_ratio'; did you mean 'pruning_rate'\?"):
        config.replace(pruning_ratio=0.5)


def test_it_is_frozen_hashable_and_picklable() -> None:
    config = PruningConfig(gradual=[(0, 0.5)])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pruning_rate = 0.1  # type: ignore[misc]
    assert hash(config) == hash(PruningConfig(gradual=((0, 0.5),)))
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("not-second-level", "not-second-level"),
        (WHERES["not-second-level"], "atedm.choices.not_second_level"),
        (functools.partial(lambda level, block: block.level == level, 3), "functools.partial("),
    ],
)
def test_as_dict_is_json_and_makes_the_config_again(where: Any, name: str) -> None:
    config = PruningConfig(gradual=((0, 0.2), (1, 0.3)), level_factors=((2, 0.5),), where=where)
    values = json.loads(json.dumps(config.as_dict()))
    assert values["where"].startswith(name)
    assert PruningConfig(**(values | {"where": config.where})) == config


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 1.5, math.nan, math.inf, -math.inf, "0.5", None, True, 0.5j])
def test_a_rate_outside_zero_to_one_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"^pruning_rate must be in \[0, 1\), the share of tokens to drop, not "):
        PruningConfig(pruning_rate=rate)
    with pytest.raises(ValueError, match=r"^a rate of gradual must be in \[0, 1\)"):
        PruningConfig(gradual=((0, rate),))


@given(st.floats(min_value=0, max_value=1, exclude_max=True))
def test_any_rate_in_zero_to_one_is_taken(rate: float) -> None:
    assert PruningConfig(pruning_rate=rate).rates == ((0, rate),)


@pytest.mark.parametrize(
    ("gradual", "message"),
    [
        (0.5, "must be .layer, rate. pairs"),
        ((0, 0.5), "must be .layer, rate. pairs"),
        (((0, 0.5, 1),), "must be .layer, rate. pairs"),
        (((-1, 0.5),), "a layer of gradual must be a whole number from 0, not -1"),
        (((1.0, 0.5),), "a layer of gradual must be a whole number from 0, not 1.0"),
        (((True, 0.5),), "a layer of gradual must be a whole number from 0, not True"),
        (((1, 0.5), (0, 0.5)), "must ascend, each once"),
        (((1, 0.5), (1, 0.5)), "must ascend, each once"),
    ],
)
def test_gradual_must_be_ascending_pairs(gradual: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningConfig(gradual=gradual)


@pytest.mark.parametrize(
    ("field", "typo", "nearest", "known"),
    [
        ("where", "not-second-levels", "not-second-level", WHERES),
        ("place", "after-ff", "after-feed-forward", PLACES),
        ("ranking", "selfattention", "self-attention", RANKINGS),
        ("head_fusion", "mean", "mean-map", HEAD_FUSIONS),
        ("recovery", "similarity", "similarity-copy", RECOVERIES),
        ("similarity", "cos", "cosine", SIMILARITIES),
        ("schedule", "prune-less", "prune-less-early", SCHEDULES),
        ("unpruned_blocks", "F-LL", "F-L", PAIRINGS),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_known(
    field: str, typo: str, nearest: str, known: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^unknown {field} '{typo}'; did you mean '{nearest}'\?") as caught:
        PruningConfig(**{field: typo})  # type: ignore[arg-type]
    assert all(repr(name) in str(caught.value) for name in known)
    for name in known:
        assert getattr(PruningConfig(**{field: name}), field) == name


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^unknown preset 'papre'; did you mean 'paper'\?"):
        preset("papre")


def test_check_name_takes_anything() -> None:
    for name in (None, 3, ["paper"]):
        with pytest.raises(ValueError, match="unknown preset"):
            check_name("preset", name, PRESETS)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("where", [3, None]),
        ("iterations", [0, -1, 1.5, True, "3"]),
        ("tolerance", [0, -1.0, math.nan, "1", True]),
        ("beta", [0, -1.0, math.inf, True]),
        ("eta", [0, -0.2, math.nan, None]),
        ("alpha", [0, -5.0, math.inf, "5"]),
        ("prune_less_share", [-0.1, 1.1, math.nan, None, True]),
        ("prune_less_factor", [-0.1, 1.1, math.nan, "1", True]),
        ("own_update_share", [-0.1, 1.1, math.nan, None, True]),
        ("merge", ["no", 0, 1, None, math.nan]),
        ("proportional_attention", ["no", 1, None]),
        ("rematch", ["no", 1, None]),
        ("refresh_every", [0, -1, 1.5, True, None]),
        ("seed", [0.5, True, None, "0"]),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(field: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{field} must be "):
            PruningConfig(**{field: value})


def test_bicubic_allows_one_pruning_layer() -> None:
    assert PruningConfig(recovery="bicubic", gradual=((1, 0.5),)).rates == ((1, 0.5),)
    with pytest.raises(ValueError, match="one pruning layer a block"):
        PruningConfig(recovery="bicubic", gradual=((0, 0.5), (1, 0.5)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranking": "lattice", "gradual": ((0, 0.5), (1, 0.5))}, "ranking 'lattice' needs a whole grid"),
        ({"similarity": "distance", "gradual": ((0, 0.5), (1, 0.5))}, "similarity 'distance' needs a whole grid"),
        (
            {"recovery": "weighted-update", "similarity": "cosine"},
            "by attention or by distance, not by 'cosine'",
        ),
        ({"match_window": 0, "similarity": "cosine"}, "match_window must be a whole number of at least 1"),
        ({"match_window": 2}, "match_window is for matches by features, not by attention"),
        ({"importance_share": 1.5}, "importance_share must be in"),
        ({"cover_share": -0.1}, "cover_share must be in"),
        ({"merge": True}, "merge is undone by an update of one match alone, not by recovery 'similarity-copy'"),
        ({"own_update_share": 0.5}, "own_update_share is for recovery 'matched-update', not for 'similarity-copy'"),
        ({"recovery": "last-update", "gradual": ((0, 0.5), (1, 0.5))}, "an own update needs a whole grid of tokens"),
        ({"reuse_place": "after-self-attention"}, "reuse_place is for steps that reuse a choice of tokens"),
        ({"reuse_place": "after-ff", "refresh_every": 2}, "did you mean 'after-feed-forward'?"),
        ({"rematch": True, "similarity": "cosine"}, "rematch is for steps that reuse a kept set"),
        ({"rematch": True, "refresh_every": 2}, "rematch is for steps that reuse a kept set"),
        ({"refresh_every": 2, "recovery": "weighted-update"}, "set refresh_every to 1"),
        ({"level_factors": ((0, 0.5),)}, "a level of level_factors must be a whole number from 1, not 0"),
        ({"level_factors": ((3, 0.5), (2, 0.5))}, "the levels of level_factors must ascend"),
        ({"level_factors": ((2, 1.5),)}, "a factor of level_factors must be in [0, 1], not 1.5"),
        ({"level_factors": 0.5}, "level_factors must be (level, factor) pairs, not 0.5"),
        ({"proportional_attention": True, "recovery": "direct-copy"}, "needs matches, which recovery 'direct-copy'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        PruningConfig(**changes)


def test_a_method_is_called_by_its_name() -> None:
    assert {name: config.method_name for name, config in PRESETS.items()} == {
        "paper": "AT-EDM",
        "dagger": "AT-EDM",
        "turbo": "AT-EDM",
        "matched": "Matched pruning",
        "matched-deep": "Matched pruning",
    }


@pytest.mark.parametrize(
    ("model", "few"),
    [
        ("stabilityai/sdxl-turbo", True),
        ("/models/sdxl-turbo/unet", True),
        ("/cache/models--stabilityai--sdxl-turbo/snapshots/f4b0486b/unet", True),
        ("/cache/models--stabilityai--sdxl-turbo/snapshots/f4b0486b", True),
        ("ByteDance/Hyper-SD", True),
        ("Hyper-SDXL-8steps", True),
        ("SDXL_tcd", True),
        ("LCMScheduler", True),
        ("DreamShaperXL_Turbo", True),
        ("someone/HyperRealism-XL", False),
        ("turbo/stable-diffusion-xl", False),
        ("/turbo/sdxl/unet", False),
        ("EulerDiscreteScheduler", False),
        ("", False),
    ],
)
def test_models_for_few_steps_are_known_by_their_own_name(model: str, few: bool) -> None:
    assert draws_in_few_steps(model) == few
