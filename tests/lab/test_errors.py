"""Errors beside dense runs: that they are what pruned runs are off by, and add up as said."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from typer.testing import CliRunner

import atedm
from atedm import AtEdm, Matched
from atedm.app.models import load_pipeline
from atedm.cli import app
from atedm.lab.charts.over_steps import errors_chart
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.errors import ErrorsReport, MethodErrors, find_errors
from atedm.method.contract import Method
from models import draw, sdxl_pipeline, sdxl_unet, snapshot

PROMPTS = ["a duck", "a rose", "a frog"]
SIZE: dict[str, Any] = {"width": 128, "height": 128}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("tiny", device="cpu")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", [Matched(), AtEdm(spare=None)], ids=["matched", "paper"])
def test_in_one_step_the_image_moves_by_what_a_pruned_run_is_off_by(
    method: Method, prediction: str, guidance: float
) -> None:
    pipe = sdxl_pipeline(sdxl_unet())
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    before = snapshot(pipe.unet)
    # A list of one timestep is no list, so the step is judged by its value in all runs alike.
    options = {"prompt": PROMPTS[0], "num_inference_steps": 1, "guidance_scale": guidance, "output_type": "latent"}
    report = find_errors(pipe, PROMPTS[:1], {"x": method}, Drawing(steps=1, guidance=guidance, seed=4))
    assert snapshot(pipe.unet).keys() == before.keys()
    dense = pipe(**options, generator=torch.Generator().manual_seed(4)).images
    with atedm.pruned(pipe, method):
        pruned = pipe(**options, generator=torch.Generator().manual_seed(4)).images
    expected = float((pruned - dense).norm() / dense.norm())
    (found,) = report.methods
    assert found.moved[0] == pytest.approx(expected, rel=1e-3)
    assert found.moved[0] == pytest.approx(found.moved_if_independent[0], rel=1e-5)
    assert expected > 1e-3


def test_the_first_block_errs_as_it_does_in_a_pruned_run(tiny: Any) -> None:
    """Of the first block pruned and dense see the same features, so a pruned run shows its error."""
    method = Matched()
    report = find_errors(tiny, PROMPTS[:1], {"x": method}, Drawing(steps=3, seed=2, **SIZE))
    name = next(iter(report.levels))
    block = tiny.unet.get_submodule(name)
    seen: list[Any] = []
    hook = block.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out.sample)),
        with_kwargs=True,
    )
    options = {"prompt": PROMPTS[:1], "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"} | SIZE
    try:
        tiny(**options, generator=[torch.Generator().manual_seed(2)])
        with atedm.pruned(tiny, method):
            tiny(**options, generator=[torch.Generator().manual_seed(2)])
    finally:
        hook.remove()
    (start, dense), (same, pruned) = seen[0], seen[3]
    assert torch.equal(start, same)
    each = (pruned - dense).flatten(1).norm(dim=-1) / (dense - start).flatten(1).norm(dim=-1)
    expected = float(each.square().mean().sqrt())
    assert report.methods[0].blocks[name][0] == pytest.approx(expected, rel=1e-4)


def test_batches_make_no_difference_and_nothing_pruned_is_no_error(tiny: Any) -> None:
    methods: dict[str, Method] = {"none": AtEdm(rate=0.0), "matched": Matched()}
    whole, parts = (find_errors(tiny, PROMPTS, methods, Drawing(steps=3, batch=batch, **SIZE)) for batch in (3, 2))
    assert whole.methods[0].blocks == {} or max(map(max, whole.methods[0].blocks.values())) == 0
    assert whole.methods[0].moved == (0.0, 0.0, 0.0)
    for a, b in zip(whole.methods, parts.methods, strict=True):
        assert a.moved == pytest.approx(b.moved, rel=1e-3, abs=1e-9)
        assert a.steps == pytest.approx(b.steps, rel=1e-3, abs=1e-9)
        assert a.successive == pytest.approx(b.successive, abs=1e-3)
        assert a.blocks.keys() == b.blocks.keys()
    assert not atedm.is_applied(tiny)
    assert isinstance(errors_chart(whole, "a title"), Image.Image)


def test_a_level_is_the_root_of_the_mean_square_of_its_blocks_and_steps() -> None:
    none = MethodErrors("none", {}, (), (), (), 0.0)
    report = ErrorsReport((none,), {"mid_block.attentions.0": 2}, 1, 2)
    assert math.isnan(report.of_level(none, 2))
    seen = MethodErrors("seen", {"mid_block.attentions.0": (0.3, 0.4)}, (), (), (), 0.0)
    assert report.of_level(seen, 2) == pytest.approx((0.125) ** 0.5)


def test_what_cannot_be_measured_is_refused(tiny: Any) -> None:
    pipe = sdxl_pipeline()
    with atedm.pruned(pipe), pytest.raises(ValueError, match="is patched or compiled"):
        find_errors(pipe, PROMPTS, {"x": Matched()}, Drawing())
    with pytest.raises(ValueError, match="no prompts"):
        find_errors(pipe, [], {"x": Matched()}, Drawing())
    with pytest.raises(ValueError, match="at least one way"):
        find_errors(pipe, PROMPTS, {}, Drawing())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="under a DDIMScheduler that predicts epsilon"):
        find_errors(pipe, PROMPTS, {"x": Matched()}, Drawing())
    draw(pipe)  # as clean as before


def test_the_command_prints_a_line_a_method_and_draws(tmp_path: Any) -> None:
    plot = tmp_path / "a" / "errors.png"
    asked = ["lab", "errors", "paper,matched", "--captions", "2", "--steps", "2", "--plot", str(plot)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "| paper | " in done.output
    assert "| matched | " in done.output
    assert plot.stat().st_size > 1000
    done = CliRunner().invoke(app, ["lab", "errors", "tome"])
    assert "which 'tome' does not do" in str(done.exception)
