"""Steps timed in turns: that everything runs, what it is compared with, and what is refused. Never the times."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import atedm
import atedm.bench as module
from atedm.bench import bench, step_share, time_in_turns
from atedm.cli import app
from atedm.config import PRESETS
from atedm.costs.architectures import architecture
from atedm.costs.tome import ToMe
from atedm.evaluation.methods import Caching, Dense, Merging, Method, Pruning
from atedm.pipelines import tiny_folder
from models import inputs, small_unet, snapshot


def test_every_method_is_timed_in_every_round_and_dense_is_always_there() -> None:
    methods = {"matched": Pruning(PRESETS["matched"]), "ToMe": Merging(ToMe(0.5))}
    seen: list[tuple[str, int, int]] = []
    report = bench("tiny", methods, device="cpu", repeats=2, progress=lambda *told: seen.append(told))
    assert list(report.rows) == ["dense", "matched", "ToMe"]
    assert [name for name, *_ in seen] == 3 * ["dense", "matched", "ToMe"]
    assert seen[-1][1:] == (9, 9)
    for name, row in report.rows.items():
        assert 0 < row.step.low <= row.step.median <= row.step.high
        assert (row.ratio == (1, 1, 1)) == (name == "dense")
    assert json.loads(json.dumps(report.as_dict()))["rows"]["matched"]["method"]["ranking"] == "representative"
    assert report.weights == "shipped"


def test_rounds_are_late_steps_of_one_run_so_that_what_is_remembered_is_at_hand() -> None:
    unet = small_unet()
    before = snapshot(unet)
    methods: dict[str, Method] = {
        "dense": Dense(),
        "own": Pruning(PRESETS["matched"]),
        "early": Pruning(PRESETS["paper"]),
    }
    seen: dict[str, list[tuple[bool, int]]] = {}
    make = module.twin_of

    def watched_twin(unet: Any) -> Any:
        twin = make(unet)

        def see(twin: Any, *_: Any) -> None:
            state = vars(twin).get("_atedm")
            if state is not None:
                memory = twin.get_submodule(state.blocks[0])._atedm.memory
                name = "own" if state.config.own_update_share else "early"
                seen.setdefault(name, []).append((memory.updates.last is not None, int(state.prune_less)))

        twin.register_forward_hook(see)
        assert all(a is b for a, b in zip(twin.parameters(), unet.parameters(), strict=True))
        return twin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "twin_of", watched_twin)
        times = time_in_turns(unet, inputs(unet), methods, 2)
    assert {name: len(values) for name, values in times.items()} == {"dense": 2, "own": 2, "early": 2}
    assert seen == {"own": [(True, 0)] * 3, "early": [(False, 0)] * 3}
    assert snapshot(unet) == before


def test_the_arithmetic_is_that_of_a_step_in_which_nothing_is_spared() -> None:
    report = atedm.cost("tiny", "paper")
    normal = report.figures().normal_step / report.figures().dense
    size = architecture("tiny").default_size
    assert step_share("tiny", Pruning(PRESETS["paper"]), size) == pytest.approx(normal)
    assert step_share("tiny", Dense(), size) == 1
    always, early = (Merging(ToMe(0.5, prune_less_share=share)) for share in (0.0, 0.3))
    assert step_share("tiny", early, size) == step_share("tiny", always, size)


def test_random_weights_of_any_architecture_and_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    build = module.random_unet

    def noted(*args: object) -> object:
        kept.append(build(*args))  # type: ignore[arg-type]
        kept.append(snapshot(kept[0]))  # type: ignore[arg-type]
        return kept[0]

    folder = tiny_folder()
    monkeypatch.setattr(module, "random_unet", noted)
    methods = {"matched": Pruning(PRESETS["matched"])}
    report = bench(str(folder), methods, device="cpu", dtype=torch.bfloat16, guidance=False, repeats=1)
    assert report.weights == "random"
    assert report.dtype == "bfloat16"
    assert snapshot(kept[0]) == kept[1]  # type: ignore[arg-type]


def test_what_a_step_does_not_show_is_refused() -> None:
    for method in (Caching(2), Dense(0.5)):
        with pytest.raises(ValueError, match="acts between steps"):
            bench("tiny", {"it": method})
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        bench("tiny", {}, repeats=0)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "matched", "--repeats", "1", "--out", str(tmp_path / "a" / "b.json")])
    assert done.exit_code == 0, done.output
    assert "| matched | 0." in done.output
    assert json.loads((tmp_path / "a" / "b.json").read_text())["rows"].keys() == {"dense", "matched"}
