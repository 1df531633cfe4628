"""Recording: what is written down is what was pruned."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import atedm
from atedm.lab.ablation import Variant
from models import run, sdxl_unet


def test_gradual_pruning_is_recorded_on_the_whole_grid() -> None:
    unet = sdxl_unet()
    gradual = Variant(gradual=((0, 0.5), (1, 0.5)), schedule="constant")
    with atedm.pruned(unet, gradual), atedm.recorded(unet) as recording:
        run(unet)
    deep = [seen for seen in recording.observations if seen.layer == 1]
    assert deep
    for second in deep:
        (first,) = (seen for seen in recording.observations if seen.block == second.block and seen.layer == 0)
        tokens = second.size[0] * second.size[1]
        assert first.importance.shape == second.importance.shape == (2, tokens)
        assert (first.keep.shape[1], second.keep.shape[1]) == (tokens // 2, tokens // 4)
        for element in (0, 1):
            assert set(second.keep[element].tolist()) < set(first.keep[element].tolist())


def test_a_step_that_broke_off_is_not_recorded() -> None:
    unet = sdxl_unet()
    once = [True]

    def break_off(*_: Any) -> None:
        if once:
            once.pop()
            raise KeyboardInterrupt

    unet.get_submodule("mid_block.attentions.0").register_forward_hook(break_off)
    with atedm.pruned(unet), atedm.recorded(unet) as recording:
        with pytest.raises(KeyboardInterrupt):
            run(unet)
        run(unet)
        run(unet)
        blocks = [seen.block for seen in recording.observations]
        assert len(blocks) == 2 * len(set(blocks))
        assert recording.evaluations == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copy_made_while_recording_is_not_recorded(duplicate: Any) -> None:
    unet = sdxl_unet()
    with atedm.pruned(unet):
        expected = run(unet)
        with atedm.recorded(unet) as recording:
            twin = duplicate(unet)
            assert torch.equal(run(twin), expected)
            assert not recording.observations
            assert recording.evaluations == 0
            run(unet)
        assert recording.evaluations == 1
        assert torch.equal(run(twin), expected)
