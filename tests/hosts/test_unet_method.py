"""The method inside the U-Net: every option runs, does what it should, and the whole agrees with a slow reference."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import atedm
import references
from atedm.choices import GUIDANCE_MASKS, PLACES, RANKINGS, RECOVERIES, SIMILARITIES
from atedm.config import PruningConfig
from atedm.coverage import lattice, representative
from atedm.matching import match_by_features
from atedm.patching.transformer import PrunedTransformer2DModel
from atedm.pruning import gather_tokens, keep_count, keep_most_important
from atedm.ranking import HEAD_FUSIONS
from atedm.schedule import PAIRINGS, SCHEDULES
from models import EARLY, LATE, TEXT_WIDTH, distance, importance, inputs, run, sd1_unet, sdxl_unet, small_unet, watched


def output(unet: Any, config: PruningConfig, timestep: Any = LATE, **changes: Any) -> Tensor:
    with atedm.pruned(unet, config):
        return run(unet, timestep, **changes)


# --- against a reference ----------------------------------------------------------------------------------------------


def reference_block(block: Any, x: Tensor, text: Tensor, config: PruningConfig) -> Tensor:
    """One attention block with its layers from diffusers, and all that is pruning from the slow references."""
    batch, channels, height, width = x.shape
    tokens = block.proj_in(block.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels))
    refills = []
    rates = dict(config.rates)
    alive = [list(range(height * width)) for _ in range(batch)]
    first: list[Any] = []
    for index, layer in enumerate(block.transformer_blocks):
        normed = layer.norm1(tokens)
        q, k = (
            project(normed).unflatten(-1, (layer.attn1.heads, -1)).transpose(1, 2).double()
            for project in (layer.attn1.to_q, layer.attn1.to_k)
        )
        scale = q.shape[-1] ** -0.5
        tokens = layer(tokens, encoder_hidden_states=text)
        maps = [
            references.mean_attention_map(q_image, k_image, scale)
            for q_image, k_image in zip(q.tolist(), k.tolist(), strict=True)
        ]
        first = first or maps
        if index not in rates:
            continue
        if config.copy_map == "first":
            maps = [[[whole[i][j] for j in left] for i in left] for whole, left in zip(first, alive, strict=True)]
        if config.similarity == "attention-transposed":
            maps = [[list(column) for column in zip(*one, strict=True)] for one in maps]
        count = keep_count(tokens.shape[1], rates[index])
        how = ("self-attention", config.head_fusion, config.iterations)
        ranks = [references.importance(*qk, scale, *how) for qk in zip(q.tolist(), k.tolist(), strict=True)]
        if config.guidance_masks == "shared":
            halves = zip(ranks[: batch // 2], ranks[batch // 2 :], strict=True)
            ranks = 2 * [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in halves]
        if config.ranking.endswith("reversed"):
            ranks = [[-value for value in ranked] for ranked in ranks]
        kept = [references.keep_most_important(ranked, count) for ranked in ranks]
        sources = [references.attention_source(one, keep) for one, keep in zip(maps, kept, strict=True)]
        alive = [[left[i] for i in keep] for left, keep in zip(alive, kept, strict=True)]
        tokens = torch.stack([tokens[b, keep] for b, keep in enumerate(kept)])
        refills.append(sources)
    for sources in reversed(refills):
        tokens = torch.stack([tokens[b, source] for b, source in enumerate(sources)])
    return block.proj_out(tokens).reshape(batch, height, width, channels).permute(0, 3, 1, 2) + x


@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig(gradual=((0, 0.3), (1, 0.5)), head_fusion="mean-map"),
        PruningConfig(gradual=((1, 0.7),), iterations=7),
        PruningConfig(gradual=((1, 0.7),), copy_map="first"),
        PruningConfig(gradual=((0, 0.3), (1, 0.5)), copy_map="first"),
        PruningConfig(ranking="self-attention-reversed", similarity="attention-transposed"),
        PruningConfig(guidance_masks="shared"),
    ],
    ids=[
        "paper",
        "gradual",
        "second-layer",
        "second-layer-first-map",
        "gradual-first-map",
        "reversed-and-transposed",
        "shared",
    ],
)
def test_a_block_agrees_with_the_slow_reference(config: PruningConfig) -> None:
    unet = sdxl_unet().double()
    atedm.apply(unet, config)
    block = unet.get_submodule("mid_block.attentions.0")
    assert isinstance(block, PrunedTransformer2DModel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 4, 5, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        actual = block(x, encoder_hidden_states=text).sample
        torch.testing.assert_close(actual, reference_block(block, x, text, config), rtol=1e-7, atol=1e-7)
        (as_tuple,) = block(x, encoder_hidden_states=text, return_dict=False)
        assert torch.equal(as_tuple, actual)
        assert not torch.allclose(actual, reference_block(block, x, text, PruningConfig(pruning_rate=0.0)), atol=0.1)


# --- matched pruning --------------------------------------------------------------------------------------------------


def block_and_text(batch: int = 2) -> tuple[Any, Tensor]:
    unet = sdxl_unet().double()
    block = unet.get_submodule("mid_block.attentions.0")
    return (unet, block), torch.randn(
        batch, 7, TEXT_WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


@pytest.mark.parametrize("place", ["before-self-attention", "after-feed-forward"])
@pytest.mark.parametrize("merge", [False, True])
def test_nothing_is_lost_where_dropped_tokens_are_copies_of_kept_ones(place: str, merge: bool) -> None:
    # Attention that counts a kept token as often as it has copies is what attention to the copies themselves would be.
    (unet, block), text = block_and_text()
    values = torch.randn(2, 48, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = values[:, :, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2] * 3 + [0, 1, 1, 2, 2, 2, 0, 0])].reshape(2, 48, 4, 8)
    config = atedm.PRESETS["matched"].replace(pruning_rate=0.6, place=place, merge=merge)
    with torch.no_grad():
        dense = block(x, encoder_hidden_states=text).sample
        for changes, lost in (({}, False), ({"proportional_attention": False}, True)):
            with atedm.pruned(unet, config.replace(**changes)):
                pruned = block(x, encoder_hidden_states=text).sample
            assert (distance(pruned, dense) > 1e-3) == lost
            assert lost or torch.allclose(pruned, dense, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_the_parts_of_matched_pruning_are_put_together_so(merge: bool) -> None:
    (unet, block), text = block_and_text()
    x = torch.randn(2, 48, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = atedm.PRESETS["matched"].replace(pruning_rate=0.5, merge=merge)
    with torch.no_grad():
        tokens = block.proj_in(block.norm(x).flatten(2).mT)
        order = representative(tokens, lattice((4, 5)), 10, config.cover_share)
        keep = keep_most_important(order, 10)
        source = match_by_features(tokens, keep).source
        count = torch.nn.functional.one_hot(source, 10).sum(1).double()
        start = gather_tokens(tokens, keep)
        if merge:
            start = torch.nn.functional.one_hot(source, 10).double().mT @ tokens / count.unsqueeze(-1)
        kept = start
        for layer in block.transformer_blocks:
            kept = layer(kept, attention_mask=count.log().unsqueeze(1), encoder_hidden_states=text)
        filled = tokens + gather_tokens(kept - start, source)
        expected = x + block.proj_out(filled).mT.reshape(x.shape)
        with atedm.pruned(unet, config):
            torch.testing.assert_close(block(x, encoder_hidden_states=text).sample, expected, rtol=1e-5, atol=1e-5)


# --- the places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sdxl_unet, sd1_unet])
@pytest.mark.parametrize(
    "config",
    [
        PruningConfig(),
        PruningConfig(recovery="zero-padding"),
        PruningConfig(recovery="bicubic"),
        PruningConfig(ranking="cross-attention-power", recovery="zero-padding"),
        PruningConfig(gradual=((0, 0.3), (1, 0.4)), where=lambda block: block.level == 3),
    ],
    ids=["similarity-copy", "zero-padding", "bicubic", "cross-attention", "gradual"],
)
def test_where_in_the_layer_tokens_are_dropped_does_not_matter_because_the_kept_never_read_them_again(
    build: Any, config: PruningConfig
) -> None:
    """Behind self-attention every token is on its own, so what the dropped ones still do is thrown away.

    Only their refill can tell: it must not depend on their values.
    """
    unet = build().double()
    dense = run(unet)
    after = [
        output(unet, config.replace(place=place)) for place in PLACES[:3] if build is sdxl_unet or place != PLACES[0]
    ]
    assert distance(after[0], dense) > 0.1
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [PruningConfig(recovery="direct-copy"), PruningConfig(similarity="cosine")])
def test_a_refill_by_the_values_of_the_dropped_tells_the_places_apart(config: PruningConfig) -> None:
    unet = sdxl_unet()
    outputs = [output(unet, config.replace(place=place)) for place in PLACES]
    assert min(distance(one, other) for one, other in combinations(outputs, 2)) > 0.1


def test_an_earlier_place_costs_less() -> None:
    savings = [atedm.apply(sdxl_unet(), PruningConfig(place=place)).saving for place in PLACES]
    assert savings[0] < savings[1] < savings[2] < savings[3]


# --- every option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("pruning_rate", (0.1, 0.3, 0.63, 0.95)),
        ("ranking", RANKINGS),
        ("head_fusion", HEAD_FUSIONS),
        ("iterations", (1, 2, 3)),
        ("tolerance", (None, 10.0)),
        # The last update is that of the match, where there was no last step.
        ("recovery", [name for name in RECOVERIES if name != "last-update"]),
        ("similarity", SIMILARITIES),
        ("gradual", ((), ((1, 0.63),), ((0, 0.4), (1, 0.4)))),
        ("where", ("everywhere", "not-second-level", "only-second-level")),
        ("guidance_masks", GUIDANCE_MASKS),
        ("importance_share", (0.0, 0.3, 1.0)),
        ("level_factors", ((), ((2, 0.5),), ((2, 0.5), (3, 0.5)))),
    ],
)
def test_each_value_of_an_option_runs_and_makes_another_image(field: str, values: Any) -> None:
    base = PruningConfig()
    if field in ("similarity", "importance_share"):
        base = base.replace(ranking="uniform-random")
    if field == "recovery":
        base = base.replace(similarity="distance")
    unet = sdxl_unet()
    outputs = [run(unet), *(output(unet, base.replace(**{field: value})) for value in values)]
    for index, one in enumerate(outputs):
        assert torch.isfinite(one).all()
        for other in outputs[:index]:
            assert distance(one, other) > 0.1


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("cover_share", (0.0, 0.4, 1.0)),
        ("match_window", (None, 1, 2)),
        ("merge", (False, True)),
        ("proportional_attention", (False, True)),
        ("similarity", ("cosine", "euclidean")),
        ("place", PLACES),
    ],
)
def test_each_value_of_an_option_of_matched_pruning_makes_another_image(field: str, values: Any) -> None:
    base = atedm.PRESETS["matched"]
    unet = sdxl_unet()
    outputs = [run(unet), *(output(unet, base.replace(**{field: value})) for value in values)]
    for index, one in enumerate(outputs):
        assert torch.isfinite(one).all()
        for other in outputs[:index]:
            assert distance(one, other) > 1e-3


def test_both_halves_of_a_guided_batch_keep_the_same_tokens_where_masks_are_shared() -> None:
    kept: dict[str, list[Tensor]] = {}
    for masks in GUIDANCE_MASKS:
        seen: list[atedm.BlockObservation] = []
        unet = sdxl_unet()
        atedm.apply(unet, PruningConfig(guidance_masks=masks))
        with atedm.observed(unet, seen.append):
            run(unet, batch=4)
        kept[masks] = [one.keep for one in seen]
    assert all(torch.equal(keep[:2], keep[2:]) for keep in kept["shared"])
    assert not any(torch.equal(keep[:2], keep[2:]) for keep in kept["separate"])
    assert not any(torch.equal(keep[0], keep[1]) for keep in kept["shared"])


def test_an_odd_batch_has_no_halves_to_share() -> None:
    with pytest.raises(ValueError, match=r"two halves, without and with the prompt, but it has 1; turn guidance on"):
        output(sdxl_unet(), PruningConfig(guidance_masks="shared"), batch=1)


@pytest.mark.parametrize(
    ("ranking", "changes"),
    [
        ("cross-attention-hard-clip", {"eta": 0.5}),
        ("cross-attention-soft-clip", {"eta": 0.9}),
        ("cross-attention-power", {"alpha": 1.0}),
        ("cross-attention-power", {"beta": 0.1}),
        ("uniform-random", {"seed": 1}),
        ("cross-attention-entropy", {"head_fusion": "mean-map"}),
    ],
)
def test_the_constants_of_a_ranking_change_the_importance(ranking: str, changes: dict[str, Any]) -> None:
    unet = small_unet()
    with atedm.pruned(unet, PruningConfig(ranking=ranking)):
        plain = importance(unet)
    with atedm.pruned(unet, PruningConfig(ranking=ranking, **changes)):
        changed = importance(unet)
    for name, value in plain.items():
        assert (changed[name] - value).abs().max() > 1e-3 * value.max()


def test_a_tolerance_stops_the_ranking_early() -> None:
    unet = sdxl_unet()
    once = output(unet, PruningConfig(iterations=1))
    assert torch.equal(output(unet, PruningConfig(iterations=50, tolerance=10.0)), once)
    settled = output(unet, PruningConfig(iterations=200))
    assert torch.equal(output(unet, PruningConfig(iterations=200, tolerance=1e-30)), settled)
    assert not torch.equal(settled, once)


def test_cross_attention_rankings_go_by_the_words_and_self_attention_does_so_only_later() -> None:
    unet = small_unet()
    words = torch.randn(2, 7, TEXT_WIDTH, generator=torch.Generator().manual_seed(9))
    first = "down_blocks.1.attentions.0"
    for ranking in RANKINGS:
        with atedm.pruned(unet, PruningConfig(ranking=ranking)):
            same = torch.equal(importance(unet)[first], importance(unet, encoder_hidden_states=words)[first])
        # Two look at features after the first layer, where the words have come in.
        assert same != ranking.startswith(("cross-attention", "representative", "facility-location"))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_pairing_spares_its_blocks_in_early_steps_only(pairing: str) -> None:
    unet = sdxl_unet()
    summary = atedm.apply(unet, PruningConfig(unpruned_blocks=pairing))
    down, up = {"F": 0, "L": 1}[pairing[0]], {"F": 0, "M": 1, "L": 2}[pairing[2]]
    spared = {f"down_blocks.{stage}.attentions.{down}" for stage in (1, 2)}
    spared |= {f"up_blocks.{stage}.attentions.{up}" for stage in (0, 1)}
    with watched(unet) as calls:
        run(unet, EARLY)
        run(unet, LATE)
    assert summary.spared == spared
    assert calls[0].kept.keys() == summary.pruned - spared
    assert calls[1].kept.keys() == summary.pruned


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_prunes_all_blocks_early_late_or_always(schedule: str) -> None:
    unet = sdxl_unet()
    everywhere = {step: output(unet, PruningConfig(schedule="constant"), step) for step in (EARLY, LATE)}
    same = {
        step: torch.equal(output(unet, PruningConfig(schedule=schedule), step), everywhere[step]) for step in everywhere
    }
    assert (
        same
        == {
            "prune-less-early": {EARLY: False, LATE: True},
            "prune-more-early": {EARLY: True, LATE: False},
            "constant": {EARLY: True, LATE: True},
        }[schedule]
    )


@pytest.mark.parametrize(
    "changes",
    [{"recovery": recovery, "ranking": ranking} for recovery, ranking in zip(2 * RECOVERIES, RANKINGS, strict=False)]
    + [{"similarity": "cosine", "head_fusion": "mean-map"}, {"place": "after-self-attention"}],
    ids=str,
)
def test_nothing_waits_for_the_device(changes: dict[str, Any]) -> None:
    """Tensors without values run through, so no value is ever read."""
    unet = small_unet().to("meta")
    call = inputs(unet)
    call = {key: value.to("meta") for key, value in call.items() if isinstance(value, Tensor)} | {
        "added_cond_kwargs": {key: value.to("meta") for key, value in call["added_cond_kwargs"].items()}
    }
    summary = atedm.apply(unet, PruningConfig(**changes))
    with watched(unet) as calls:
        for timestep in torch.linspace(999, 0, 2, device="meta"):
            assert run(unet, timestep, **call).shape == (2, 4, 16, 16)
    assert [call.step for call in calls] == [0, 1]
    assert [call.is_prune_less(summary) for call in calls] == [True, False]


# --- uniform random ---------------------------------------------------------------------------------------------------


def test_random_ranking_moves_with_the_step_and_leaves_the_generator_alone() -> None:
    unet = small_unet()
    atedm.apply(unet, PruningConfig(ranking="uniform-random"))
    timesteps = torch.linspace(999, 0, 10)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    at = [importance(unet, t)["mid_block.attentions.0"] for t in (timesteps[4], timesteps[5], timesteps[4])]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(at[0], at[2])
    assert not torch.equal(at[0], at[1])
    assert not torch.equal(at[0][0], at[0][1])  # nor are the images of a batch pruned alike
    expected = references.uniform_random(2, 64, seed=0, step=4)
    assert torch.equal(at[0].double(), torch.tensor(expected, dtype=torch.float64))


def test_random_ranking_needs_no_more_than_its_seed_to_be_the_same() -> None:
    config = PruningConfig(ranking="uniform-random", seed=5)
    torch.manual_seed(1)
    first = output(small_unet(), config)
    torch.manual_seed(2)
    assert torch.equal(output(small_unet(), config), first)
    assert not torch.equal(output(small_unet(), config.replace(seed=6)), first)
