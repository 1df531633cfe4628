"""Whether rankings find objects: the measure, and the run that collects both."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import atedm
from atedm.app.models import load_pipeline
from atedm.cli import app
from atedm.hosts.state import Observation
from atedm.lab.ablation import Variant
from atedm.lab.charts.over_steps import objects_chart
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.objects import area_under_curve, find_objects
from atedm.tiny import weights_folder
from atedm.tiny.judge import JUDGE, load_judge
from atedm.tiny.scenes import held_out_scenes


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


@given(
    importance=st.lists(st.integers(0, 5), min_size=2, max_size=30),
    data=st.data(),
)
def test_the_area_is_the_share_of_pairs_in_the_right_order(importance: list[int], data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.booleans(), min_size=len(importance), max_size=len(importance)))
    if all(kinds) or not any(kinds):
        assert np.isnan(area_under_curve(torch.tensor(importance), torch.tensor(kinds)))
        return
    pairs = [
        (a, b)
        for a, k in zip(importance, kinds, strict=True)
        if k
        for b, j in zip(importance, kinds, strict=True)
        if not j
    ]
    right = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert area_under_curve(torch.tensor(importance), torch.tensor(kinds)) == pytest.approx(right)


def test_what_is_found_is_what_pruning_goes_by_and_the_image_stays_the_same(pipe: Any) -> None:
    scenes = held_out_scenes(2, 1)

    def draw() -> Any:
        generators = [torch.Generator("cpu").manual_seed(i) for i in range(2)]
        return pipe(
            [s.caption for s in scenes],
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=generators,
            output_type="pt",
        ).images

    before = draw()
    report = find_objects(pipe, scenes, Drawing(steps=2), rankings=["self-attention", "cross-attention-power"])
    assert torch.equal(draw(), before)
    maps = load_judge(weights_folder() / JUDGE).object_maps(before)
    first = report.findings[0].block
    for ranking in report.rankings:
        seen: list[Observation] = []
        with atedm.pruned(pipe, Variant(rank=ranking, schedule="constant")), atedm.observed(pipe, seen.append):
            draw()
        assert seen[0].block == first  # so nothing was dropped before it
        grids = torch.nn.functional.adaptive_avg_pool2d(maps, seen[0].size).flatten(1) > 0.5
        expected = [area_under_curve(i, grid) for i, grid in zip(seen[0].importance[2:], grids, strict=True)]
        found = next(f for f in report.findings if (f.ranking, f.step, f.block) == (ranking, 0, first))
        assert found.auc == pytest.approx(sum(expected) / 2, abs=1e-4)
        assert found.attention_match < found.best_match <= 1


def test_a_random_ranking_finds_nothing_and_every_block_and_step_is_there(pipe: Any) -> None:
    report = find_objects(pipe, held_out_scenes(4, 2), Drawing(steps=3, batch=3), rankings=["uniform-random"])
    assert report.mean("auc", ranking="uniform-random") == pytest.approx(0.5, abs=0.05)
    assert len(report.findings) == 11 * 3
    assert report.levels == [2, 3]
    assert objects_chart(report).width > objects_chart(report).height


def test_it_is_measured_dense_and_of_something(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        find_objects(pipe, [], Drawing())
    with atedm.pruned(pipe), pytest.raises(ValueError, match="patched"):
        find_objects(pipe, held_out_scenes(1), Drawing())


def test_the_command_prints_a_table_and_draws_a_chart(tmp_path: Any) -> None:
    done = CliRunner().invoke(
        app, ["lab", "objects", "--captions", "2", "--steps", "1", "--plot", str(tmp_path / "a" / "b.png")]
    )
    assert done.exit_code == 0, done.output
    assert "| self-attention | 0." in done.output
    assert (tmp_path / "a" / "b.png").exists()
