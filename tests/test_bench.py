"""Methods timed in turns: that everything runs, what it is compared with, and what is refused. Never the times."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import atedm
from atedm.bench import bench, run, turns
from atedm.bench.run import share_of_image, share_of_step
from atedm.bench.turns import images_in_turns, steps_in_turns
from atedm.cli import app
from atedm.config import PRESETS
from atedm.costs.architectures import architecture
from atedm.costs.tome import ToMe
from atedm.evaluation.methods import Caching, Dense, Merging, Method, Pruning, Stacked, counted_run
from atedm.pictures.bench_chart import bench_chart
from atedm.pipelines import load_pipeline, tiny_folder
from models import inputs, small_unet, snapshot


def test_every_method_is_timed_in_every_round_and_dense_is_always_there() -> None:
    methods = {"matched": Pruning(PRESETS["matched"]), "ToMe": Merging(ToMe(0.5))}
    seen: list[tuple[str, int, int]] = []
    report = bench(
        "tiny", methods, whole_images=False, device="cpu", repeats=2, progress=lambda *told: seen.append(told)
    )
    assert list(report.rows) == ["dense", "matched", "ToMe"]
    assert [name for name, *_ in seen] == 4 * ["dense", "matched", "ToMe"]  # to warm up, twice for time, for memory
    assert seen[-1][1:] == (12, 12)
    for name, row in report.rows.items():
        assert 0 < row.time.low <= row.time.median <= row.time.high
        assert (row.ratio == (1, 1, 1)) == (name == "dense")
        assert row.peak is not None
        assert row.peak > 0
    assert json.loads(json.dumps(report.as_dict()))["rows"]["matched"]["method"]["ranking"] == "representative"
    assert (report.weights, report.timed, report.steps) == ("random", "step", None)
    assert bench_chart(report).width > bench_chart(report).height


def test_whole_images_are_what_a_pipeline_draws_with_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    pipe = load_pipeline("tiny", device="cpu")
    before = snapshot(pipe.unet)

    class Kept:
        unet = pipe.unet

        def __call__(self, **call: Any) -> Any:
            images = pipe(**call, output_type="pt").images
            drawn[f"{call['num_inference_steps']} steps" if not atedm.is_applied(pipe.unet) else "pruned"] = images
            return images

    methods: dict[str, Method] = {"dense": Dense(), "half": Dense(0.5), "matched": Pruning(PRESETS["matched"])}
    call = {"prompt": ["a red circle"], "guidance_scale": 0.0}
    took = images_in_turns(Kept(), call, methods, 2, 1, memory=True)
    assert all(len(times) == 1 and peak for times, peak in took.values())

    def alone(steps: int) -> torch.Tensor:
        images: torch.Tensor = pipe(
            **call, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0), output_type="pt"
        ).images
        return images

    assert torch.equal(drawn["2 steps"], alone(2))
    assert torch.equal(drawn["1 steps"], alone(1))
    with atedm.pruned(pipe, "matched"):
        assert torch.equal(drawn["pruned"], alone(2))
    assert snapshot(pipe.unet) == before


def test_rounds_are_late_steps_of_one_run_so_that_what_is_remembered_is_at_hand() -> None:
    unet = small_unet()
    before = snapshot(unet)
    methods: dict[str, Method] = {
        "dense": Dense(),
        "own": Pruning(PRESETS["matched"]),
        "early": Pruning(PRESETS["paper"]),
    }
    seen: dict[str, list[tuple[bool, int]]] = {}
    make = turns.twin_of

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
        patch.setattr(turns, "twin_of", watched_twin)
        took = steps_in_turns(unet, inputs(unet), methods, 2)
    assert {name: (len(times), peak) for name, (times, peak) in took.items()} == dict.fromkeys(methods, (2, None))
    assert seen == {"own": [(True, 0)] * 3, "early": [(False, 0)] * 3}
    assert snapshot(unet) == before


def test_a_turn_of_what_works_in_cycles_is_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def counted(unet: Any, call: Any, method: Method, steps: int, *, before: int = 0) -> Iterator[Any]:
        name = str(method.as_dict())
        yield lambda: calls.append(name)

    monkeypatch.setattr(turns, "run_of_steps", counted)
    kept = Pruning(PRESETS["paper"].replace(refresh_every=2))
    known = Pruning(PRESETS["paper"].replace(refresh_every=1000))
    both = Stacked((kept, Caching(3)))
    methods: dict[str, Method] = {"dense": Dense(), "cached": Caching(3), "kept": kept, "known": known, "both": both}
    steps_in_turns(small_unet(), {"sample": None}, methods, 1)
    counts = {name: calls.count(str(method.as_dict())) for name, method in methods.items()}
    assert counts == {"dense": 2, "cached": 6, "kept": 4, "known": 2, "both": 12}


def test_the_arithmetic_is_that_of_a_step_in_which_nothing_is_spared() -> None:
    report = atedm.cost("tiny", "paper")
    normal = report.figures().normal_step / report.figures().dense
    size = architecture("tiny").default_size
    assert share_of_step("tiny", Pruning(PRESETS["paper"]), size) == pytest.approx(normal)
    assert share_of_step("tiny", Dense(), size) == 1
    always, early = (Merging(ToMe(0.5, prune_less_share=share)) for share in (0.0, 0.3))
    assert share_of_step("tiny", early, size) == share_of_step("tiny", always, size)


@pytest.mark.parametrize(
    "method", [Pruning(PRESETS["paper"]), Stacked((Pruning(PRESETS["matched"]), Caching(2)))], ids=["paper", "stacked"]
)
def test_the_arithmetic_of_an_image_is_what_torch_counts_on_a_run(method: Method) -> None:
    pipe = load_pipeline("tiny", device="cpu")
    size = architecture("tiny").default_size

    def count(of: Method) -> int:
        return counted_run(pipe, of, "a red circle", steps=5, guidance=0.0, width=size[0], height=size[1])

    assert share_of_image("tiny", method, size, 5) == pytest.approx(count(method) / count(Dense()), rel=1e-6)
    assert share_of_image("tiny", Dense(0.4), size, 5) == 0.4


def test_weights_are_random_unless_they_are_there_and_the_model_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = []
    build = run.random_unet

    def noted(*args: object) -> object:
        kept.append(build(*args))  # type: ignore[arg-type]
        kept.append(snapshot(kept[0]))  # type: ignore[arg-type]
        return kept[0]

    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((tiny_folder() / "unet" / "config.json").read_text())
    monkeypatch.setattr(run, "random_unet", noted)
    methods = {"matched": Pruning(PRESETS["matched"])}
    report = bench(str(tmp_path), methods, device="cpu", dtype=torch.bfloat16, guidance=False, repeats=1, memory=False)
    assert (report.timed, report.weights, report.dtype) == ("step", "random", "bfloat16")
    assert report.rows["dense"].peak is None
    assert snapshot(kept[0]) == kept[1]  # type: ignore[arg-type]
    report = bench(str(tiny_folder()), methods, device="cpu", guidance=False, repeats=1, steps=2)
    assert (report.timed, report.weights, report.steps) == ("image", "its own", 2)


def test_what_a_step_does_not_show_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer steps"):
        bench("tiny", {"it": Dense(0.5)}, whole_images=False)
    stack = Stacked((Dense(0.75), Pruning(PRESETS["matched"])))
    with pytest.raises(ValueError, match="both takes fewer steps"):
        bench("tiny", {"matched": Pruning(PRESETS["matched"]), "both": stack}, whole_images=False)
    for name in ("repeats", "steps", "batch"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            bench("tiny", {}, **{name: 0})  # type: ignore[arg-type]


def test_the_command_prints_a_table_writes_json_and_draws(tmp_path: Path) -> None:
    out, plot = tmp_path / "a" / "b.json", tmp_path / "c" / "d.png"
    arguments = ["bench", "matched,deepcache", "--repeats", "1", "--steps", "2", "--out", str(out), "--plot", str(plot)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "| matched | 0." in done.output
    assert "ms an image" in done.output
    assert json.loads(out.read_text())["rows"].keys() == {"dense", "matched", "deepcache"}
    assert plot.exists()
