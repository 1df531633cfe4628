import functools
import json
from pathlib import Path
from typing import Any

import pytest
import thop
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import atedm
from atedm import AtEdm, Matched, not_second_level
from atedm.app.models import load_pipeline
from atedm.costs.architectures import architecture
from atedm.costs.budget import fit_to_budget, profile_of
from atedm.costs.counting import count_macs
from atedm.costs.report import CostReport, cost
from atedm.costs.tome import ToMe
from atedm.lab.ablation import Variant
from atedm.method.presets import METHODS
from atedm.tiny import TINY, weights_folder
from models import inputs, sd1_unet, sdxl_unet

report_of = functools.cache(cost)


def tera(figures: Any) -> list[str]:
    return [f"{value / 1e12:.3f}" for value in figures]


# --- the paper's figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [("paper", ["6.729", "4.049", "4.967", "4.324"]), ("dagger", ["6.729", "4.424", "5.193", "4.655"])],
)
def test_sdxl_at_1024_pixels_costs_what_the_paper_counts(method: str, expected: list[str]) -> None:
    report = report_of("sdxl", method)
    assert tera(report.figures("paper")) == expected
    assert tera(report.figures("exact"))[0] == "6.761"
    assert (report.size, report.guidance, report.steps, report.early_steps) == ((1024, 1024), True, 50, 15)


@pytest.mark.parametrize(("ratio", "expected"), [(0.4, "4.559"), (0.5, "4.051"), (0.6, "3.563"), (0.75, "2.853")])
def test_tome_on_sdxl_costs_what_the_paper_counts(ratio: float, expected: str) -> None:
    assert tera(report_of("sdxl", "paper").with_tome(ToMe(ratio), "paper"))[1:] == [expected] * 3


def test_a_report_on_tome_is_what_with_tome_says() -> None:
    report = report_of("sdxl", ToMe(0.6, "self-attention"))
    for convention in ("exact", "paper"):
        assert report.figures(convention) == report_of("sdxl", "paper").with_tome(report.method, convention)  # type: ignore[arg-type]
    assert report.early_steps == 0
    assert report.overhead() > 0


def test_tome_as_it_comes_does_nothing_for_sdxl_which_has_no_attention_at_the_highest_level() -> None:
    figures = report_of("sdxl", "paper").with_tome(ToMe(0.75, levels="highest"))
    assert figures.saving_normal == figures.saving_mean == 0


def test_sdxl_turbo_costs_what_the_paper_counts() -> None:
    report = report_of("sdxl-turbo", "turbo")
    assert (report.size, report.guidance, report.early_steps) == ((512, 512), False, 0)
    assert tera(report.figures("paper"))[0] == "0.790"
    assert report.figures("paper").saving_normal == pytest.approx(0.3343, abs=5e-5)
    assert report.figures("paper").saving_mean == report.figures("paper").saving_normal


@pytest.mark.parametrize(
    ("model", "side", "percent"), [("sdxl", 512, 74), ("sdxl", 2048, 82), ("sd15", 512, 48), ("sd15", 768, 56)]
)
def test_attention_dominates_sdxl_at_every_size_and_not_sd1_at_512(model: str, side: int, percent: int) -> None:
    profile = profile_of(architecture(model), (side, side))
    assert round(100 * (1 - profile.rest / profile.dense())) == percent


# --- the two conventions ----------------------------------------------------------------------------------------------


def thop_macs(unet: nn.Module, call: dict[str, Any]) -> float:
    """What THOP says of Linear and convolution; it also gives normalisation a few operations a value."""
    call = dict(call)

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: torch.Tensor) -> Any:
            return self.unet(sample, 0, **call)

    sample = call.pop("sample")
    ignored = {kind: lambda *_: None for kind in (nn.LayerNorm, nn.GroupNorm)}
    macs, _ = thop.profile(Positional(), inputs=(sample,), custom_ops=ignored, verbose=False)
    return float(macs)


@pytest.mark.parametrize("build", [sdxl_unet, sd1_unet])
@pytest.mark.parametrize("size", [(12, 20)])
def test_thop_misses_self_attention_and_equation_1_fills_just_that_gap(build: Any, size: tuple[int, int]) -> None:
    unet: UNet2DConditionModel = build()
    pixels = (size[1] * 8, size[0] * 8)
    report = cost(unet, Matched(), size=pixels, guidance=True)
    assert {block.shape.words for block in report.spans} == {77}
    blocks = [block.shape for block in report.spans]
    # Eq. 1 with a batch of one: 4 because of guidance and because there are two products.
    calibration = sum(4 * b.place.layers * b.tokens**2 * b.channels for b in blocks)
    by_thop = 2 * thop_macs(unet, inputs(unet, size, batch=1, words=77))
    assert by_thop + calibration == report.figures("paper").dense
    products_of_words = sum(2 * 2 * b.place.layers * b.tokens * b.words * b.channels for b in blocks)
    assert by_thop + calibration + products_of_words == report.figures("exact").dense


def test_thop_grows_linearly_with_the_tokens_which_is_how_the_paper_found_it_out() -> None:
    unet = sdxl_unet()

    def is_linear(small: float, middle: float, large: float) -> bool:  # at 1, 4 and 9 times the tokens
        return (middle - small) / 3 == (large - middle) / 5

    sides = (8, 16, 24)
    assert is_linear(*(thop_macs(sdxl_unet(), inputs(unet, (side, side), batch=1)) for side in sides))
    paper = [profile_of(architecture(unet), (8 * side, 8 * side)).dense("paper") for side in sides]
    assert not is_linear(*paper)


@pytest.mark.parametrize(("model", "size"), [("sd21", (384, 640)), (TINY, None)])
def test_the_figures_of_a_pruned_step_are_counted_on_the_patched_model(
    model: str, size: tuple[int, int] | None
) -> None:
    method = Variant(place="after-self-attention", rate=0.7)
    report = cost(model, method, size=size, batch=3)
    arch = architecture(model)
    images = 3 * (2 if arch.guidance else 1)
    unet = arch.on_meta()
    dense = count_macs(unet, arch.call(size, images), 0)
    with atedm.pruned(unet, method):
        normal, less = (count_macs(unet, arch.call(size, images), timestep) for timestep in (0, 999))
    figures = report.figures()
    assert figures[:3] == (dense.total, normal.total, less.total)
    early = report.early_steps / report.steps
    assert figures.mean == pytest.approx(early * less.total + (1 - early) * normal.total)
    assert figures.normal_step < figures.early_step < figures.dense
    for block in report.spans:
        assert normal.spans[block.shape.place.name] == block.normal_step.exact
    assert sum(stage.resnet for stage in report.stages) == sum(dense.resnets.values())


def test_a_unet_with_parts_that_the_formula_does_not_know_is_refused() -> None:
    unet = sdxl_unet(dual_cross_attention=True)
    with pytest.raises(
        (ValueError, TypeError), match=r"not known here|not a BasicTransformerBlock|Dual|nothing to prune"
    ):
        cost(unet)


# --- what a report says -----------------------------------------------------------------------------------------------


def test_the_json_has_every_key_and_adds_up() -> None:
    content = json.loads(json.dumps(report_of("sdxl", "paper").as_dict()))
    assert content["unit"] == "TMAC"
    keys = {"dense", "normal_step", "early_step", "mean", "saving_normal", "saving_mean"}
    for convention in ("paper", "exact"):
        figures = content["convention"][convention]
        assert figures.keys() == keys
        for step in ("dense", "normal_step", "early_step"):
            whole = sum(s["resnet"] + s["other"] + s["attention"][convention][step] for s in content["stages"])
            assert whole == pytest.approx(figures[step], abs=2e-5)
            blocks = sum(block[convention][step] for block in content["blocks"])
            assert blocks == pytest.approx(sum(s["attention"][convention][step] for s in content["stages"]), abs=2e-5)
    assert content["overhead_of_a_normal_step"] > 0
    assert len(content["blocks"]) == 11
    assert content["method"] == METHODS["paper"].as_dict()


def test_batch_and_guidance_multiply() -> None:
    two = report_of(TINY, "paper").figures()
    assert cost(TINY, "paper", batch=3, guidance=False).figures() == pytest.approx([1.5 * value for value in two])


def test_a_loaded_pipeline_a_unet_a_folder_and_a_name_say_the_same() -> None:
    pipe = load_pipeline(TINY, device="cpu")
    named, folder, unet = (architecture(one) for one in (TINY, weights_folder(), pipe.unet))
    assert (named.latents(), named.words) == (folder.latents(), folder.words)
    assert unet.latents() == named.latents()
    assert unet.words == architecture(weights_folder() / "unet").words == 77  # where the captions have 20
    with atedm.pruned(pipe):
        assert cost(pipe, "paper").figures() == report_of(TINY, "paper").figures()


def test_blocks_of_one_layer_are_pruned_by_what_needs_no_dense_layer() -> None:
    report = report_of("sd15")
    assert isinstance(report.method, Matched)
    assert report.figures("paper").saving_normal > 0.2
    with pytest.raises(ValueError, match=r'atedm\.apply\(pipe, "matched"\) works here'):
        cost("sd15", "paper")


def test_mirrored_and_constant_schedules_count_their_own_steps() -> None:
    mirror = cost(TINY, Variant(schedule="prune-more-early"))
    paper = report_of(TINY, "paper")
    assert mirror.figures()[:3] == paper.figures()[:3]
    assert mirror.early_steps == 14  # of 20
    constant = cost(TINY, AtEdm(spare=None))
    assert constant.figures().mean == constant.figures().normal_step == constant.figures().early_step
    assert not any(block.spared for block in constant.spans)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("sdlx", {}, "did you mean 'sdxl'"),
        ("./nowhere", {}, "no folder"),
        ("sdxl", {"size": (1000, 1001)}, "height must be a multiple of 8 pixels for sdxl"),
        (TINY, {"size": (130, 128)}, "width must be a multiple of 4 pixels for tiny"),
        ("sdxl", {"batch": 0}, "batch must be a whole number of at least 1"),
        ("sdxl", {"steps": 0}, "steps must be a whole number of at least 1"),
        ("sdxl", {"method": "papre"}, "did you mean 'paper'"),
    ],
    ids=str,
)
def test_bad_input_is_told_before_anything_is_counted(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cost(model, **options)


def test_a_folder_without_a_known_model_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no model"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="it holds a list"):
        architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(ValueError, match="SanaTransformer2DModel"):
        architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "down_block_types": ["Nope"]}')
    with pytest.raises(ValueError, match="cannot build the model"):
        architecture(tmp_path).on_meta()


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "convention"), [("mean", "exact"), ("normal-step", "paper")])
def test_a_budget_is_kept_and_just_so(of: str, convention: str) -> None:
    fitted = fit_to_budget(TINY, AtEdm(), share=0.85, of=of, convention=convention)
    figures = cost(TINY, fitted).figures(convention)
    reached = figures.mean if of == "mean" else figures.normal_step
    assert 0.845 * figures.dense < reached <= 0.85 * figures.dense
    tmacs = fit_to_budget(TINY, AtEdm(), tmacs=0.85 * figures.dense / 1e12, of=of, convention=convention)
    assert tmacs.rate == pytest.approx(fitted.rate, abs=2e-6)


def test_the_paper_keeps_37_percent_at_4_1_t_in_a_normal_step() -> None:
    fitted = fit_to_budget("sdxl", AtEdm(), tmacs=4.1, of="normal-step", convention="paper")
    assert 1 - fitted.rate == pytest.approx(0.38, abs=0.005)
    mean = fit_to_budget("sdxl", AtEdm(), tmacs=4.1, of="mean", convention="paper")
    assert 1 - mean.rate == pytest.approx(0.306, abs=0.001)


def test_a_budget_counts_size_guidance_steps_and_the_method_it_starts_from() -> None:
    turbo = fit_to_budget(TINY, METHODS["turbo"], tmacs=7e-3, guidance=False)
    assert isinstance(turbo, AtEdm)
    assert (turbo.where, turbo.spare) == (not_second_level, None)
    figures = cost(TINY, turbo, guidance=False).figures()
    assert 6.93e9 < figures.mean <= 7e9 < figures.dense
    large = fit_to_budget(TINY, Matched(), share=0.8, size=(256, 256), steps=8)
    assert cost(TINY, large, size=(256, 256), steps=8).figures().saving_mean == pytest.approx(0.2, abs=2e-3)


def test_tome_is_solved_for_equal_cost() -> None:
    mean = report_of("sdxl", "paper").figures().mean
    tome = fit_to_budget("sdxl", ToMe(), tmacs=mean / 1e12)
    assert isinstance(tome, ToMe)
    assert report_of("sdxl", "paper").with_tome(tome).mean == pytest.approx(mean, rel=2e-3)
    with pytest.raises(ValueError, match="a step with ToMe cannot cost 2 T MACs"):
        fit_to_budget("sdxl", ToMe(), tmacs=2)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tmacs": 2.9, "convention": "paper"}, r"2\.9 T MACs, 43\.1% of the dense 6\.729; .* down to 3\.081, 45\.8%"),
        ({"share": 1.1}, r"cannot cost .*110\.0% of the dense"),
        ({"share": 0.0}, "above 0"),
        ({"share": float("nan")}, "above 0"),
        ({"share": "half"}, "above 0"),
        ({}, "one of the two"),
        ({"share": 0.6, "tmacs": 4.0}, "one of the two"),
        ({"share": 0.6, "of": "run"}, "unknown of 'run'"),
        ({"share": 0.6, "convention": "thop"}, "unknown convention"),
    ],
    ids=str,
)
def test_an_impossible_budget_is_told_with_the_floor(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_to_budget("sdxl", AtEdm(), **budget)


def test_reports_are_of_one_kind() -> None:
    assert isinstance(report_of(TINY, "paper"), CostReport)
    assert atedm.cost is cost


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.5}, ValueError, "not 2.5"),
        ({"size": 64}, ValueError, r"size must be \(width, height\) in pixels, not 64"),
        ({"size": (64.0, 64)}, ValueError, "width must be a multiple of 4 pixels"),
        ({"method": None}, TypeError, "for the rate of a method or the ratio of ToMe, not for None"),
    ],
)
def test_a_budget_of_nonsense_is_told(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_to_budget("tiny", **({"method": AtEdm(), "share": 0.9} | options))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 80},
    ],
)
def test_models_with_classes_are_counted(changes: dict[str, Any]) -> None:
    unet = sd1_unet(**changes)
    with atedm.pruned(unet, Matched(), budget=0.99) as summary:
        assert 0.97 < summary.cost() <= 0.99
