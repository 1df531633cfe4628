"""Variants in a U-Net: the same images as the methods, every place and way to the map, choices that last, and costs."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import references
from atedm.costs.architectures import WORDS
from atedm.costs.flops import flop_counter
from atedm.costs.spans import span_macs, span_run_macs
from atedm.lab.ablation import Variant, variant_of
from atedm.lab.ablation.block import AblatedTransformer2DModel
from atedm.lab.ablation.settings import PLACES, SCHEDULES
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Method
from atedm.method.keep import keep_count
from atedm.method.matched import Matched
from atedm.patch import apply, observed, pruned, remove
from models import EARLY, LATE, TEXT_WIDTH, distance, inputs, run, sd1_unet, sdxl_unet, small_unet

ALWAYS = Variant(schedule="constant")
MATCHED = dataclasses.replace(variant_of(Matched()), own_update_share=0.0)


def with_changes(base: Variant, **changes: Any) -> Variant:
    return dataclasses.replace(base, **changes)


def output(unet: Any, method: Method, timestep: Any = LATE, **changes: Any) -> Tensor:
    with pruned(unet, method):
        return run(unet, timestep, **changes)


def outputs(unet: Any, method: Method, steps: int = 3) -> list[Tensor]:
    """Those of a run, each step with inputs of its own."""
    with pruned(unet, method):
        return [run(unet, t, **inputs(unet, seed=i)) for i, t in enumerate(torch.linspace(999, 0, steps))]


# --- against the methods and a reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AtEdm(), AtEdm(sample=None, spare=None), Matched()], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_variant_of_a_method_gives_the_same_images(method: Method, dtype: torch.dtype) -> None:
    unet = (sdxl_unet() if dtype == torch.float32 else small_unet()).to(dtype)
    mine, expected = outputs(unet, variant_of(method)), outputs(unet, method)
    assert all(torch.equal(one, other) for one, other in zip(mine, expected, strict=True))
    assert type(unet.get_submodule("mid_block.attentions.0")).__name__ == "Transformer2DModel"


def reference_block(block: Any, x: Tensor, text: Tensor, variant: Variant) -> Tensor:
    """One attention block with its layers from diffusers, and all that is pruning from the slow references."""
    batch, channels, height, width = x.shape
    tokens = block.proj_in(block.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels))
    refills = []
    rates = dict(variant.drops)
    for index, layer in enumerate(block.transformer_blocks):
        normed = layer.norm1(tokens)
        q, k = (
            project(normed).unflatten(-1, (layer.attn1.heads, -1)).transpose(1, 2).double()
            for project in (layer.attn1.to_q, layer.attn1.to_k)
        )
        scale = q.shape[-1] ** -0.5
        tokens = layer(tokens, encoder_hidden_states=text)
        if index not in rates:
            continue
        images = list(zip(q.tolist(), k.tolist(), strict=True))
        how = ("self-attention", variant.head_fusion, variant.iterations)
        sign = -1 if variant.rank.endswith("reversed") else 1
        kept, sources = [], []
        for q_image, k_image in images:
            ranked = [sign * value for value in references.importance(q_image, k_image, scale, *how)]
            keep = references.keep_most_important(ranked, keep_count(tokens.shape[1], rates[index]))
            kept.append(keep)
            sources.append(references.attention_source(references.mean_attention_map(q_image, k_image, scale), keep))
        tokens = torch.stack([tokens[b, keep] for b, keep in enumerate(kept)])
        refills.append(sources)
    for sources in reversed(refills):
        tokens = torch.stack([tokens[b, source] for b, source in enumerate(sources)])
    return block.proj_out(tokens).reshape(batch, height, width, channels).permute(0, 3, 1, 2) + x


@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant(gradual=((0, 0.3), (1, 0.5)), head_fusion="mean-map"),
        Variant(gradual=((1, 0.7),), iterations=7),
        Variant(rank="self-attention-reversed"),
    ],
    ids=["paper", "gradual", "second-layer", "reversed"],
)
def test_a_block_agrees_with_the_slow_reference(variant: Variant) -> None:
    unet = sdxl_unet().double()
    apply(unet, variant)
    block = unet.get_submodule("mid_block.attentions.0")
    assert isinstance(block, AblatedTransformer2DModel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 4, 5, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        actual = block(x, encoder_hidden_states=text).sample
        torch.testing.assert_close(actual, reference_block(block, x, text, variant), rtol=1e-7, atol=1e-7)
        (as_tuple,) = block(x, encoder_hidden_states=text, return_dict=False)
        assert torch.equal(as_tuple, actual)
        assert not torch.allclose(actual, reference_block(block, x, text, Variant(rate=0.0)), atol=0.1)


@pytest.mark.parametrize("place", ["before-self-attention", "after-feed-forward"])
@pytest.mark.parametrize("merge", [False, True])
def test_nothing_is_lost_where_dropped_tokens_are_copies_of_kept_ones(place: str, merge: bool) -> None:
    # Attention that counts a kept token as often as it has copies is what attention to the copies themselves would be.
    unet = sdxl_unet().double()
    block = unet.get_submodule("mid_block.attentions.0")
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 48, 3, generator=generator, dtype=torch.float64)
    x = values[:, :, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2] * 3 + [0, 1, 1, 2, 2, 2, 0, 0])].reshape(2, 48, 4, 8)
    variant = with_changes(MATCHED, rate=0.6, place=place, merge=merge)
    with torch.no_grad():
        dense = block(x, encoder_hidden_states=text).sample
        for counts in (True, False):
            with pruned(unet, with_changes(variant, counts=counts)):
                found = block(x, encoder_hidden_states=text).sample
            assert (distance(found, dense) < 1e-5) == counts


# --- the places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sdxl_unet, sd1_unet])
@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant(refill="zero-padding"),
        Variant(refill="bicubic"),
        Variant(rank="cross-attention-power", refill="zero-padding"),
        Variant(gradual=((0, 0.3), (1, 0.4)), where=lambda place: place.level == 3),
    ],
    ids=["similarity-copy", "zero-padding", "bicubic", "cross-attention", "gradual"],
)
def test_where_in_the_layer_tokens_are_dropped_does_not_matter_because_the_kept_never_read_them_again(
    build: Callable[[], Any], variant: Variant
) -> None:
    """Behind self-attention every token is on its own, so what the dropped ones still do is thrown away.

    Only their refill can tell: it must not depend on their values.
    """
    unet = build().double()
    places = PLACES[:3] if build is sdxl_unet else PLACES[1:3]
    after = [output(unet, with_changes(variant, place=place)) for place in places]
    assert distance(after[0], run(unet)) > 0.1
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", [Variant(refill="direct-copy"), Variant(match="cosine")], ids=["direct", "cosine"])
def test_a_refill_by_the_values_of_the_dropped_tells_the_places_apart(variant: Variant) -> None:
    unet = sdxl_unet()
    by_place = [output(unet, with_changes(variant, place=place)) for place in PLACES]
    assert min(distance(one, other) for one, other in combinations(by_place, 2)) > 0.1


def test_an_overridden_layer_is_refused_where_it_would_be_passed_over() -> None:
    unet = small_unet()
    layer = unet.get_submodule("mid_block.attentions.0").transformer_blocks[0]
    layer.forward = layer.forward
    inside = [Variant(place=place) for place in PLACES[1:3]] + [Variant(rank="cross-attention-power")]
    for variant in inside:
        with pytest.raises(ValueError, match=r"of mid_block\.attentions\.0\.transformer_blocks\.0 is overridden"):
            apply(unet, variant)
        assert not hasattr(unet, "_atedm")
    for variant in (Variant(), MATCHED, with_changes(inside[0], gradual=((1, 0.5),))):
        assert output(unet, variant).isfinite().all()


# --- every choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values", "base"),
    [
        ("rate", (0.1, 0.3, 0.63, 0.95), Variant()),
        ("match", ("attention", "euclidean", "cosine"), Variant(rank="uniform-random")),
        ("gradual", ((), ((1, 0.63),), ((0, 0.4), (1, 0.4))), Variant()),
        ("level_factors", ((), ((2, 0.5),), ((2, 0.5), (3, 0.5))), Variant()),
        ("refill", ("similarity-copy", "zero-padding", "bicubic", "direct-copy", "matched-update"), Variant()),
        ("counts", (False, True), MATCHED),
        ("merge", (False, True), MATCHED),
        ("place", PLACES, MATCHED),
    ],
    ids=["rate", "match", "gradual", "levels", "refill", "counts", "merge", "place"],
)
def test_each_value_of_a_choice_makes_another_image(field: str, values: tuple[Any, ...], base: Variant) -> None:
    unet = sdxl_unet()
    found = [run(unet), *(output(unet, with_changes(base, **{field: value})) for value in values)]
    assert all(torch.isfinite(one).all() for one in found)
    assert min(distance(one, other) for one, other in combinations(found, 2)) > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_prunes_all_blocks_early_late_or_always(schedule: str) -> None:
    unet = sdxl_unet()
    same = [
        torch.equal(output(unet, Variant(schedule=schedule), step), output(unet, ALWAYS, step))
        for step in (EARLY, LATE)
    ]
    expected = {"prune-less-early": [False, True], "prune-more-early": [True, False], "constant": [True, True]}
    assert same == expected[schedule]


@pytest.mark.parametrize(
    "variant",
    [
        Variant(rank="lattice", refill="zero-padding"),
        Variant(rank="cross-attention-power", refill="direct-copy"),
        Variant(rank="facility-location", place="before-feed-forward"),
        Variant(head_fusion="mean-map", match="cosine"),
        Variant(place="after-self-attention", gradual=((0, 0.3), (1, 0.4))),
        Variant(refresh_every=2, map_mode="blocked"),
        with_changes(MATCHED, refresh_every=2, own_update_share=0.5),
    ],
    ids=["lattice", "words", "facility", "mean-map", "inside", "refreshed", "matched"],
)
def test_nothing_waits_for_the_device(variant: Variant) -> None:
    """Tensors without values run through, so no value is ever read."""
    unet = small_unet().to("meta")
    call = inputs(unet)
    call = {key: value.to("meta") for key, value in call.items() if isinstance(value, Tensor)} | {
        "added_cond_kwargs": {key: value.to("meta") for key, value in call["added_cond_kwargs"].items()}
    }
    apply(unet, variant)
    for timestep in torch.linspace(999, 0, 3, device="meta"):
        assert run(unet, timestep, **call).shape == (2, 4, 16, 16)


# --- ways to the map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["blocked", "sampled", "flash", "triton"])
@pytest.mark.parametrize(
    "variant",
    [
        ALWAYS,
        with_changes(ALWAYS, rank="uniform-random"),
        with_changes(ALWAYS, gradual=((0, 0.3), (1, 0.4))),
        with_changes(ALWAYS, head_fusion="mean-map"),
    ],
    ids=["paper", "random", "gradual", "mean-map"],
)
def test_a_pruned_unet_gives_the_same_by_every_exact_way(variant: Variant, mode: str) -> None:
    """A sample of all rows is all of the map."""
    if mode == "triton":
        pytest.importorskip("triton")
    unet = small_unet().to("cuda" if torch.cuda.is_available() else "cpu")
    expected = output(unet, with_changes(variant, map_mode="full"), size=(12, 12))
    found = output(unet, with_changes(variant, map_mode=mode, sampled_rows=9999), size=(12, 12))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_few_rows_make_another_image_that_moves_with_the_step() -> None:
    unet = sdxl_unet()
    steps = torch.full((4,), 500)
    whole = output(unet, ALWAYS, steps[0])
    with pruned(unet, with_changes(ALWAYS, map_mode="sampled", sampled_rows=4)):
        first, second, again = run(unet, steps[0]), run(unet, steps[1]), run(unet, steps[0])
    assert torch.equal(first, again)
    assert min(distance(first, whole), distance(first, second)) > 0.1


# --- choices that last ------------------------------------------------------------------------------------------------

LASTING = {
    "paper": Variant(refresh_every=3),
    "gradual": Variant(refresh_every=4, gradual=((0, 0.3), (1, 0.4))),
    "matched": with_changes(MATCHED, refresh_every=3),
    "matched, own updates": with_changes(MATCHED, refresh_every=2, own_update_share=0.6),
}


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_choice_lasts_so_many_steps(every: int) -> None:
    unet = small_unet()
    seen: dict[int, Tensor] = {}
    with (
        pruned(unet, with_changes(MATCHED, refresh_every=every)),  # whose lattice moves with every step
        observed(unet, lambda one: seen.update({one.step: one.keep})),
    ):
        for t in torch.full((8,), 500):
            run(unet, t)
    for step in range(1, 8):
        assert torch.equal(seen[step], seen[step - 1]) == (step % every != 0)


@pytest.mark.parametrize(
    "changes", [{}, {"place": "before-self-attention"}, {"rank": "cross-attention-entropy"}], ids=str
)
def test_a_step_that_goes_by_an_earlier_choice_gives_what_choosing_the_same_would(changes: dict[str, Any]) -> None:
    unet, steps = small_unet(), torch.full((4,), 500)
    variant = with_changes(ALWAYS, **changes)
    fresh = output(unet, variant, 500, **inputs(unet, seed=5))
    apply(unet, with_changes(variant, refresh_every=4))
    first, second = run(unet, steps[0]), run(unet, steps[1])
    assert torch.equal(first, second)  # same inputs, same choice
    assert torch.equal(run(unet, torch.full((4,), 500)[0], **inputs(unet, seed=5)), fresh)  # of another run
    # With other inputs the choice is that of the step before, and the rest is its own.
    run(unet, steps[0])
    assert not torch.allclose(run(unet, steps[1], **inputs(unet, seed=5)), fresh, atol=1e-3)


@pytest.mark.parametrize("name", LASTING)
def test_nothing_lasts_over_another_run_a_copy_or_another_size(name: str) -> None:
    unet, steps = small_unet(), torch.linspace(999, 0, 6)
    call = inputs(unet, seed=3)
    fresh = output(unet, LASTING[name], torch.linspace(999, 0, 6)[4], **call)
    apply(unet, LASTING[name])
    run(unet, steps[3])
    copies = [copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]
    assert not torch.allclose(run(unet, steps[4], **call), fresh, atol=1e-4)
    for each in copies:
        assert torch.equal(run(each, steps[4], **call), fresh)
    run(unet, steps[2])
    assert torch.equal(run(unet, torch.linspace(999, 0, 6)[4], **call), fresh)
    run(unet, steps[3], size=(12, 12))
    assert torch.equal(run(unet, steps[4], **call), fresh)  # a choice for other tokens is none
    remove(unet)


def test_no_gradient_lives_on_in_what_is_remembered() -> None:
    unet = small_unet()
    apply(unet, LASTING["matched, own updates"])
    call = inputs(unet)
    for t in torch.linspace(999, 0, 3):
        out = unet(**call, timestep=t).sample
    memories = [unet.get_submodule(name)._atedm.memory for name in unet._atedm.spans]
    assert memories
    for memory in memories:
        assert not memory.last.updates.requires_grad
        assert not any(x.requires_grad for x in memory.last.choices[0] if x is not None)
    out.sum().backward()  # through the last step alone
    assert unet.conv_in.weight.grad is not None


# --- what it costs ----------------------------------------------------------------------------------------------------

COSTS = {
    **LASTING,
    "mean-map": Variant(head_fusion="mean-map"),
    "gradual inside": Variant(gradual=((0, 0.3), (1, 0.5)), place="after-self-attention"),
    "before feed-forward": Variant(place="before-feed-forward", match="cosine"),
    "words": Variant(rank="cross-attention-entropy", refill="direct-copy", rate=0.9),
    "in blocks": Variant(map_mode="blocked", rank="important-of-cells"),
    "flash": Variant(map_mode="flash", iterations=2),
    "few rows": Variant(map_mode="sampled", sampled_rows=6),
    "mirrored": with_changes(MATCHED, schedule="prune-more-early", refresh_every=4),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_a_run_is_what_torch_counts(name: str) -> None:
    unet, variant, steps = small_unet(), COSTS[name], 5
    call = inputs(unet, batch=1, words=WORDS)

    def counted(timesteps: Tensor) -> int:
        with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for t in timesteps:
                unet(**call, timestep=t)
        return int(counter.get_total_flops()) // 2

    dense = counted(torch.linspace(999, 0, steps)[:1])
    with pruned(unet, variant) as summary:
        found = counted(torch.linspace(999, 0, steps))
    spans = sum(span_macs(shape).exact for shape in summary.shapes)
    run_of_spans = sum(span_run_macs(shape, variant, steps).exact for shape in summary.shapes)
    assert found == steps * (dense - spans) + run_of_spans


def test_an_earlier_place_costs_less() -> None:
    costs = [apply(small_unet(), Variant(place=place, refill="direct-copy")).cost(50) for place in PLACES]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4
