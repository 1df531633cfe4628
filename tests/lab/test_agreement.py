"""How far modes of the map agree with the whole map: by hand, on the model that ships, and from the command line."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import atedm
from atedm.app.models import load_pipeline
from atedm.cli import app
from atedm.lab.ablation import Variant
from atedm.lab.ablation.choosing import Ranking
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.agreement import compared, map_agreement


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


def test_two_rankings_are_compared_by_what_they_keep_and_copy() -> None:
    whole = Ranking(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), lambda keep: torch.tensor([[0, 1, 0, 0]]))
    # It keeps 0 and 2 in place of 0 and 1; 2 and 3 are dropped by the whole map and copy token 0.
    ours = Ranking(torch.tensor([[9.0, 1.0, 5.0, 0.0]]), lambda keep: torch.tensor([[0, 1, 0, 1]]))
    ((kept, importance, source),) = compared(whole, ours, 2)
    assert kept == 0.5
    assert importance == pytest.approx(0.6 / 0.7)
    assert source == 0.5


def test_exact_modes_agree_and_a_sample_the_better_the_more_there_is_of_it(pipe: Any) -> None:
    modes = {
        "full": Variant(map_mode="full"),
        "blocked": Variant(map_mode="blocked"),
        "flash": Variant(map_mode="flash"),
        "all": Variant(map_mode="sampled", sampled_rows=1024),
        "many": Variant(map_mode="sampled", sampled_rows=48),
        "few": Variant(map_mode="sampled", sampled_rows=8),
    }
    found = map_agreement(pipe, ["a duck", "a castle"], modes, Drawing(steps=2, batch=1))
    rows = {(row.mode, row.level): row for row in found}
    assert len(rows) == len(found) == 12
    for level in (2, 3):
        for mode in ("full", "blocked", "flash", "all"):
            row = rows[mode, level]
            assert min(row.kept, row.importance, row.source) > 0.995, row
        many, few = rows["many", level], rows["few", level]
        assert 0.37 < few.kept < many.kept < 1
        assert few.importance < many.importance < 1
        assert few.source < many.source < 1


def test_every_image_weighs_the_same(pipe: Any) -> None:
    modes = {"few": Variant(map_mode="sampled", sampled_rows=8)}
    prompts = ["a duck", "a castle", "a frog"]
    one, two = (map_agreement(pipe, prompts, modes, Drawing(steps=1, batch=batch)) for batch in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a.kept, a.importance, a.source) == pytest.approx((b.kept, b.importance, b.source), abs=2e-3)


def test_it_is_looked_at_dense_and_on_something(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        map_agreement(pipe, [], {}, Drawing())
    with atedm.pruned(pipe), pytest.raises(ValueError, match="patched"):
        map_agreement(pipe, ["a duck"], {}, Drawing())
    with pytest.raises(ValueError, match=r"no token of .* is dropped at a rate of 0\.001; give 0\.0"):
        map_agreement(pipe, ["a duck"], {"full": Variant()}, Drawing(steps=1), rate=0.001)


def test_the_command_prints_a_table_and_says_what_it_cannot_read() -> None:
    arguments = ["lab", "agreement", "blocked,sampled/16", "--captions", "1", "--steps", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "| blocked | 2 | 1.000 | 1.000 | 1.000 |" in done.output
    assert "| sampled/16 | 3 | 0." in done.output
    for wrong, message in (("sampled/few", "a number of rows"), ("sampeld", "did you mean 'sampled'")):
        done = CliRunner().invoke(app, ["lab", "agreement", wrong])
        assert done.exit_code != 0
        assert message in str(done.exception)
