"""Attention-map variance per denoising step: against brute force, and without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from PIL import Image
from torch import Tensor, nn

import atedm
from atedm.cli.lab.dense_runs import variance
from atedm.hosts.unet_spans import find_spans
from atedm.lab.charts.over_steps import variance_chart
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import first_layers_watched
from atedm.lab.probes.variance import BlockVariance, VarianceReport, attention_variance, map_variance
from models import draw, each_layer, sdxl_pipeline, sdxl_unet, small_unet, snapshot

SIDE = {"width": 64, "height": 64}
TALL = {"width": 64, "height": 96}
PROMPTS = ["a duck", "a rose"]


def reference_variance(q: Tensor, k: Tensor, scale: float) -> tuple[float, float]:
    """Entry by entry in float64: mean over heads and batch of each map's variance, and that of the head-mean map."""
    a = torch.softmax(scale * q.double() @ k.double().mT, dim=-1)  # (B, H, N, N)
    batch, heads, tokens, _ = a.shape

    def of(one: Tensor) -> float:
        mean = sum(float(x) for x in one.flatten()) / tokens**2
        return sum((float(x) - mean) ** 2 for x in one.flatten()) / tokens**2

    each = [of(a[b, h]) for b in range(batch) for h in range(heads)]
    fused = [of(a[b].mean(0)) for b in range(batch)]
    return sum(each) / len(each), sum(fused) / len(fused)


def calls_by_hand(pipe: Any, steps: int, prompts: list[str] = PROMPTS) -> dict[str, list[list[tuple[float, float]]]]:
    """The reference of every call of the U-Net, by block and image, from what the first layer's norm gives."""
    seen: dict[str, list[list[tuple[float, float]]]] = {}

    def note(name: str, attention: Any) -> Callable[..., None]:
        def hook(_: Any, __: Any, normed: Tensor) -> None:
            q, k = (
                (normed.double() @ to.weight.double().T).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                for to in (attention.to_q, attention.to_k)
            )
            a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
            per_head = a.flatten(2).var(-1, unbiased=False).mean()
            seen[name][-1].append((float(per_head), float(a.mean(1).flatten(1).var(-1, unbiased=False).mean())))

        return hook

    hooks = []
    for name, (_, module) in find_spans(pipe.unet).items():
        seen[name] = []
        layer = module.transformer_blocks[0]
        hooks.append(layer.norm1.register_forward_hook(note(name, layer.attn1)))
    for index, prompt in enumerate(prompts):
        for images in seen.values():
            images.append([])
        draw(pipe, seed=index, prompt=prompt, num_inference_steps=steps, **TALL)
    for hook in hooks:
        hook.remove()
    return seen


def report_of(means: list[float]) -> VarianceReport:
    """A report of two blocks: one of level 2 with the given means times 0.5, one of level 3 with them times 1.5."""
    rows = [
        BlockVariance(step, f"block {level}", level, 4 ** (4 - level), factor * mean, factor * mean / 2)
        for step, mean in enumerate(means)
        for level, factor in ((2, 0.5), (3, 1.5))
    ]
    return VarianceReport(tuple(rows), 1, len(means))


# --- the variance of a map --------------------------------------------------------------------------------------------


def test_map_variance_is_the_brute_force_one() -> None:
    q, k = torch.randn(2, 2, 3, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    q, k = 2 * q, 2 * k
    assert map_variance(q, k, 0.5).tolist() == pytest.approx(reference_variance(q, k, 0.5), rel=1e-5)


def test_a_uniform_map_has_no_variance() -> None:
    assert map_variance(torch.zeros(1, 2, 16, 4), torch.randn(1, 2, 16, 4), 0.5).tolist() == [0, 0]


def test_a_one_hot_map_by_hand() -> None:
    # Token i attends to itself alone: N entries are 1 and the rest 0, so the variance is 1/N - 1/N^2.
    q = 200 * torch.eye(4)[None, None]
    assert map_variance(q, q, 1.0).tolist() == pytest.approx([3 / 16, 3 / 16])


def test_variance_of_nearly_equal_entries_is_not_lost_in_rounding() -> None:
    q, k = torch.randn(2, 1, 1, 32, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    q = 3e-4 * q
    wanted = reference_variance(q, k, 0.5)
    assert wanted[0] < 1e-9
    assert map_variance(q, k, 0.5).tolist() == pytest.approx(wanted, rel=2e-3)


def test_relative_variance_by_hand() -> None:
    row = BlockVariance(step=0, block="b", level=2, tokens=4, per_head=0.5, head_mean=0.25)
    assert row.relative_per_head == 8.0


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "groups"),
    [
        (EulerDiscreteScheduler, [[0], [1], [2], [3]]),
        (HeunDiscreteScheduler, [[0, 1], [2, 3], [4, 5], [6]]),  # the last step is of first order
        (lambda: PNDMScheduler(skip_prk_steps=True), [[0, 1], [2], [3], [4]]),  # the first step is evaluated twice
    ],
    ids=["euler", "heun", "pndm"],
)
def test_each_step_is_the_mean_of_its_calls_and_images(scheduler: Any, groups: list[list[int]]) -> None:
    pipe = sdxl_pipeline()
    pipe.scheduler = scheduler()
    # Or a second norm would change nothing.
    each_layer(pipe.unet, lambda layer: nn.init.uniform_(layer.norm1.weight, 0.5, 1.5))
    by_hand = calls_by_hand(pipe, steps=4)
    told: list[tuple[str, int, int]] = []
    report = attention_variance(pipe, PROMPTS, Drawing(steps=4, **TALL), progress=lambda *at: told.append(at))
    calls = sum(map(len, groups))
    assert told == [("images", call + 1, 2 * calls) for call in range(2 * calls)]
    blocks = [*find_spans(pipe.unet)]
    assert [(row.step, row.block) for row in report.rows] == [(s, b) for s in range(4) for b in blocks]
    for row in report.rows:
        expected = np.mean([images[call] for images in by_hand[row.block] for call in groups[row.step]], axis=0)
        assert (row.per_head, row.head_mean) == pytest.approx(tuple(expected), rel=1e-4)
        assert (row.level, row.tokens) == ((2, 96) if row.tokens == 96 else (3, 24))


def test_heads_differ_here_so_that_their_mean_is_smoother() -> None:
    report = attention_variance(sdxl_pipeline(), ["a duck"], Drawing(steps=1, guidance=0.0, **SIDE))
    assert all(row.head_mean < row.per_head for row in report.rows)


def test_seed_and_guidance_are_honoured() -> None:
    pipe = sdxl_pipeline(small_unet())

    def means(**changes: Any) -> list[float]:
        options: dict[str, Any] = {"steps": 2} | SIDE | changes
        return attention_variance(pipe, ["a duck"], Drawing(**options)).mean_by_step()

    usual = means()
    assert means() == usual
    assert means(seed=1) != usual
    assert means(guidance=0.0) != usual


def test_measuring_leaves_the_image_alone_and_no_trace() -> None:
    pipe = sdxl_pipeline()
    before, dense = snapshot(pipe.unet), draw(pipe)
    seen: list[str] = []
    with first_layers_watched(find_spans(pipe.unet), lambda view: seen.append(view.place.name), rate=None):
        assert torch.equal(draw(pipe), dense)
    assert seen == 4 * [*find_spans(pipe.unet)]
    attention_variance(pipe, ["a duck"], Drawing(steps=2, **SIDE))
    assert snapshot(pipe.unet) == before


def test_no_trace_after_a_raise() -> None:
    pipe = sdxl_pipeline(small_unet())
    before = snapshot(pipe.unet)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attention_variance(pipe, ["a duck"], Drawing(steps=2, **SIDE), progress=stop)
    assert snapshot(pipe.unet) == before


def test_what_cannot_be_measured_is_refused() -> None:
    pipe = sdxl_pipeline(small_unet())
    for prompts in ([], [" "]):
        with pytest.raises(ValueError, match="no prompts"):
            attention_variance(pipe, prompts, Drawing(steps=2))
    with atedm.pruned(pipe, "matched"), pytest.raises(ValueError, match=r"call atedm\.remove"):
        attention_variance(pipe, ["x"], Drawing(steps=2))
    plain = pipe.unet
    pipe.unet = torch.compile(plain)
    with pytest.raises(ValueError, match="compiled"):
        attention_variance(pipe, ["x"], Drawing(steps=2))
    with pytest.raises(TypeError, match="no U-Net"):
        attention_variance(object(), ["x"], Drawing(steps=2))
    pipe.unet = sdxl_unet(only_cross_attention=True, cross_attention_dim=64, block_out_channels=(16, 32, 48))
    with pytest.raises(ValueError, match="no self-attention"):
        attention_variance(pipe, ["x"], Drawing(steps=2, **SIDE))
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_a_unet_without_attention_is_refused() -> None:
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    changes = {"block_out_channels": (16, 32), "mid_block_type": None, "transformer_layers_per_block": 1}
    pipe = sdxl_pipeline(sdxl_unet(**plain, **changes, attention_head_dim=2))
    with pytest.raises(ValueError, match="no attention blocks"):
        attention_variance(pipe, ["x"], Drawing(steps=2))


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_by_hand() -> None:
    report = report_of([1e-6, 3e-5, 5e-6, 1e-3])
    assert report.mean_by_step() == pytest.approx([1e-6, 3e-5, 5e-6, 1e-3])
    assert report.mean_by_step("head_mean") == pytest.approx([5e-7, 1.5e-5, 2.5e-6, 5e-4])
    assert report.mean_by_level()[2] == pytest.approx([5e-7, 1.5e-5, 2.5e-6, 5e-4])
    assert list(report.mean_by_level()) == [2, 3]
    assert report.mean_by_step("relative_per_head", 2)[0] == pytest.approx(16**2 * 5e-7)
    assert report.first_step_above(1e-5) == 1  # though step 2 is below again
    assert report.first_step_above(1e-4) == 3
    assert report.first_step_above(1.0) is None
    assert report_of([1.0]).first_step_above(1.0) is None  # as much is not above


def test_report_as_json() -> None:
    report = report_of([1e-6, 3e-5])
    plain = json.loads(json.dumps(report.as_dict(2e-5)))
    assert plain["first_step_above"] == 1
    assert plain["threshold"] == 2e-5
    assert plain["mean_by_step"] == report.mean_by_step()
    assert plain["mean_by_level"]["3"] == report.mean_by_level()[3]
    assert plain["rows"][0] == {
        "step": 0, "block": "block 2", "level": 2, "tokens": 16, "per_head": 5e-7, "head_mean": 2.5e-7,
    }  # fmt: skip


@pytest.mark.parametrize("means", [[1e-6, 3e-5, 2e-4, 1e-4] * 5, [3e-5], [0.0, 0.0]])
@pytest.mark.filterwarnings("error")
def test_chart_shows_a_report(means: list[float]) -> None:
    chart = np.asarray(variance_chart(report_of(means), title="a title"))
    assert chart.shape[2] == 3
    assert 0.01 < (chart < 200).any(-1).mean() < 0.2  # lines and letters on white, nothing painted over


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(variance)

    def run(*arguments: str) -> str:
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_command_prints_a_table(command: Callable[..., str], tmp_path: Path) -> None:
    plot = tmp_path / "new" / "variance.png"
    lines = command("a duck", "--steps", "2", "--size", "64x64", "--plot", str(plot)).splitlines()
    assert lines[0] == "| step | mean | relative | level 2 | level 3 |"
    assert [line.split()[1] for line in lines[2:4]] == ["0", "1"]
    assert "first above 1e-05 in step 0: 0 of 2 steps come before it, 0% of the run" in lines[5]
    assert "in the paper 30%, 15 of 50" in lines[5]
    assert lines[6] == str(plot)
    assert Image.open(plot).size[0] > 800
    assert list(plot.parent.iterdir()) == [plot]


def test_table_by_hand() -> None:
    lines = report_of([1e-6, 3e-6, 5e-6, 1e-3]).table(1e-5).splitlines()
    assert lines[2].split(" | ")[1:4] == ["1e-06", "7.6e-05", "5e-07"]
    assert lines[-1].startswith("the mean is first above 1e-05 in step 3: 3 of 4 steps come before it, 75% of the run")
    assert report_of([1e-6]).table(1e-5).splitlines()[-1].startswith("the mean is never above 1e-05")
    # However long the run, the table is short, and has its first and its last step.
    shown = [line.split()[1] for line in report_of([1e-6] * 50).table(1e-5).splitlines()[2:-2]]
    assert len(shown) == 11
    assert (shown[0], shown[-1]) == ("0", "49")


def test_command_prints_json_alone(command: Callable[..., str]) -> None:
    printed = json.loads(command("a duck", "--steps", "2", "--size", "64x64", "--threshold", "0.9", "--json"))
    assert printed["model"] == "tiny"
    assert printed["first_step_above"] is None
    assert len(printed["mean_by_step"]) == 2
    assert len(printed["rows"]) == 2 * 11


def test_command_says_what_is_wrong(command: Callable[..., str]) -> None:
    for arguments, message in (
        (("--threshold", "0"), "threshold must be above 0"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--size", "64"), "size must be WIDTHxHEIGHT"),
        ((" ",), "a prompt is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            command(*arguments)
