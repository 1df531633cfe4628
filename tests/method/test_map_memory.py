"""Memory that really runs out for a map: it is made in blocks, and said."""

import logging
from pathlib import Path

import pytest
import torch

from atedm.method.contract import QueriesAndKeys
from atedm.method.map_scores import scores_in_blocks, self_attention_scores
from faults import ended, faults, in_child, memory_left


def attention() -> QueriesAndKeys:
    """Of 8,192 tokens, whose map in float32 takes 256 MiB."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 8192, 16, generator=generator) for _ in "qk")
    return QueriesAndKeys(q, k, 0.25)


def write_ranking(file: Path, memory: int | None) -> None:
    logging.getLogger("atedm").addHandler(logging.StreamHandler())
    asked = attention()
    if memory is not None:
        memory_left(memory)()
    with torch.no_grad():
        torch.save(self_attention_scores(asked, sample=None, size=(64, 128)).importance, file)


def test_where_memory_runs_out_for_a_map_it_is_made_in_blocks_and_said_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        blocked = scores_in_blocks(*attention()).importance
    for number, chance in enumerate(faults("out of memory in the map", 0.02)):
        memory, file = chance.randrange(80, 250) * 2**20, tmp_path / f"{number}.pt"
        assert ended(in_child(lambda file=file, memory=memory: write_ranking(file, memory))) == 0  # type: ignore[misc]
        assert torch.equal(torch.load(file), blocked)
        assert "no memory for whole attention maps" in capfd.readouterr().err
    assert ended(in_child(lambda: write_ranking(tmp_path / "whole.pt", None))) == 0
    assert "no memory" not in capfd.readouterr().err
    torch.testing.assert_close(torch.load(tmp_path / "whole.pt"), blocked)
