"""Functions from outside of the package in place of names: given what is said, used everywhere, refused clearly."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import atedm
from atedm.bench.run import share_of_image, share_of_step
from atedm.cli import app
from atedm.config import PruningConfig
from atedm.costs.architectures import architecture
from atedm.evaluation.methods import Pruning
from atedm.evaluation.methods_by_name import method_by_name
from atedm.map_modes import Scores, scores_in_blocks
from atedm.pruning import gather_tokens
from atedm.recovery import direct_copy, zero_padding
from models import EARLY, LATE, run, sdxl_unet, snapshot

DOCS = Path(__file__).parents[1] / "docs" / "extending.md"


def by_received(to_rank: atedm.ToRank) -> Tensor:
    q, k, scale = to_rank.self_attention()
    return torch.softmax(scale * q.float() @ k.float().mT, -1).mean((1, 2))


def as_direct_copy(to_refill: atedm.ToRefill) -> Tensor:
    return direct_copy(to_refill.kept, to_refill.keep, to_refill.before)


def never(share: float) -> bool:
    return False


def by_blocks(q: Tensor, k: Tensor, scale: float, *, head_fusion: str, iterations: int) -> Scores:
    return scores_in_blocks(q, k, scale, head_fusion=head_fusion, iterations=iterations)


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"ranking": by_received}, {"ranking": "attention-received"}),
        ({"recovery": as_direct_copy}, {"recovery": "direct-copy"}),
        ({"schedule": never}, {"schedule": "constant"}),
        ({"map_mode": by_blocks}, {"map_mode": "blocked"}),
    ],
    ids=["ranking", "recovery", "schedule", "map_mode"],
)
@pytest.mark.parametrize("timestep", [EARLY, LATE], ids=["early", "late"])
def test_a_function_that_does_what_a_name_does_gives_the_same(
    own: dict[str, Any], named: dict[str, Any], timestep: int
) -> None:
    unet = sdxl_unet()
    before = snapshot(unet)
    with atedm.pruned(unet, PruningConfig(**named)):
        expected = run(unet, timestep)
    with atedm.pruned(unet, PruningConfig(**own)) as summary:
        torch.testing.assert_close(run(unet, timestep), expected, rtol=1e-4, atol=1e-5)
        assert ("not counted" in str(summary)) == ("schedule" not in own)
    assert snapshot(unet) == before


def test_functions_are_given_what_is_promised() -> None:
    unet = sdxl_unet()
    seen: list[Any] = []

    def rank(to_rank: atedm.ToRank) -> Tensor:
        batch, tokens, width = to_rank.tokens.shape
        q, k, scale = to_rank.self_attention()
        words = to_rank.cross_attention()
        assert q.shape == k.shape == (batch, q.shape[1], tokens, width // q.shape[1])
        assert words.q.shape == q.shape
        assert words.k.shape[2] == 7
        assert scale == pytest.approx(q.shape[3] ** -0.5)
        assert to_rank.size is not None
        assert to_rank.size[0] * to_rank.size[1] == tokens
        assert to_rank.count == round(0.5 * tokens)
        seen.append(int(to_rank.step))
        return -torch.arange(tokens, device=q.device, dtype=torch.float32).expand(batch, -1)

    def refill(to_refill: atedm.ToRefill) -> Tensor:
        batch, kept = to_refill.keep.shape
        assert torch.equal(to_refill.keep, torch.arange(kept).expand(batch, -1))  # as the ranking above says
        assert torch.equal(gather_tokens(to_refill.before, to_refill.keep), to_refill.start)
        assert to_refill.kept.shape == to_refill.start.shape
        seen.append("refilled")
        return zero_padding(to_refill.kept, to_refill.keep, to_refill.before.shape[1])

    steps = torch.arange(9, -1, -1)
    with atedm.pruned(unet, PruningConfig(0.5, ranking=rank, recovery=refill, schedule="constant")) as summary:
        run(unet, steps[4])
    assert seen == len(summary.pruned) * [4, "refilled"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"ranking": lambda to_rank: to_rank.tokens}, r"ranking .*lambda.* of shape \(2, \d+\), not \(2, \d+, \d+\)"),
        ({"ranking": lambda to_rank: None}, "not NoneType"),
        ({"recovery": lambda to_refill: to_refill.kept}, r"recovery .* must give a tensor of shape \(2, \d+, \d+\)"),
        ({"map_mode": lambda q, k, *_, **__: Scores(q, lambda keep: keep)}, "map_mode .* must give"),
        ({"map_mode": lambda q, k, *_, **__: q}, "map_mode .* must give Scores, not a Tensor"),
        (
            {"map_mode": lambda q, k, *_, **__: Scores(q[:, 0, :, 0], lambda keep: keep[:, :3])},
            r"the source of map_mode .* of shape \(2, \d+\), not \(2, 3\)",
        ),
    ],
)
def test_a_wrong_shape_is_named_and_the_model_left_clean(own: dict[str, Any], message: str) -> None:
    unet = sdxl_unet()
    before = snapshot(unet)
    with pytest.raises(ValueError, match=message), atedm.pruned(unet, PruningConfig(**own)):
        run(unet)
    assert snapshot(unet) == before


def test_other_fields_take_names_only() -> None:
    with pytest.raises(ValueError, match="unknown place"):
        PruningConfig(place=never)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown ranking"):
        PruningConfig(ranking="mine:contrast")  # strings never import


def test_its_arithmetic_is_counted_and_no_formula_is_made_up() -> None:
    size = architecture("tiny").default_size
    named, own = Pruning(PruningConfig(map_mode="blocked")), Pruning(PruningConfig(map_mode=by_blocks))
    assert share_of_step("tiny", own, size) == pytest.approx(share_of_step("tiny", named, size), rel=1e-9)
    assert share_of_image("tiny", own, size, 5) == pytest.approx(share_of_image("tiny", named, size, 5), rel=1e-9)
    with pytest.raises(ValueError, match="own map_mode takes"):
        atedm.cost("tiny", own.config)
    report = atedm.cost("tiny", PruningConfig(schedule=lambda share: 0.4 < share < 0.6))
    assert report.figures().normal_step < report.figures().mean < report.figures().prune_less_step


def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, script = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    scope: dict[str, Any] = {}
    exec(compile(script, "docs/extending.md", "exec"), scope)
    assert scope["image"].size == (128, 128)
    assert scope["config"].as_dict()["ranking"] == "mine.contrast"


def test_commands_of_the_page_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCS.read_text()
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    method = method_by_name("paper[ranking=mine:contrast,recovery=mine:blend]")
    assert isinstance(method, Pruning)
    assert method.as_dict()["recovery"] == "mine.blend"
    for line in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0].strip().splitlines():
        words = re.findall(r'"[^"]*"|\S+', line)[1:]
        smaller = {"20": "2", "8": "2"} if words[0] == "evaluate" else {}
        done = CliRunner().invoke(app, [smaller.get(word, word).strip('"') for word in words])
        assert done.exit_code == 0, (done.output, done.exception)
        assert "mine:contrast" in done.output
    for wrong in ("mine:nothing", "nowhere:contrast", "mine:torch"):
        with pytest.raises(ValueError, match=wrong):
            method_by_name(f"paper[ranking={wrong}]")
