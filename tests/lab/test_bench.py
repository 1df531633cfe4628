"""Methods timed in turns: that everything runs, what it is compared with, and what is refused. Never the times."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import atedm
from atedm import METHODS
from atedm.app.models import load_pipeline
from atedm.cli import app
from atedm.costs.architectures import architecture
from atedm.costs.report import cost
from atedm.costs.tome import ToMe
from atedm.lab.ablation import Variant
from atedm.lab.bench import bench as bench_module
from atedm.lab.bench.bench import bench, images_in_turns, steps_in_turns
from atedm.lab.bench.peak import peak_of
from atedm.lab.charts.times import bench_chart
from atedm.lab.methods.candidates import Candidate, Dense, Pruning
from atedm.lab.methods.counting import late_step_cost
from atedm.lab.methods.peers import Caching, Merging
from atedm.lab.methods.stacked import Stacked
from atedm.lab.progress import silent
from atedm.lab.random_unet import random_unet
from atedm.lab.setup import Setup
from atedm.lab.timing import Spread, Stopwatch
from atedm.tiny import weights_folder
from models import inputs, small_unet, snapshot

MATCHED, PAPER = Pruning(METHODS["matched"]), Pruning(METHODS["paper"])


def test_every_method_is_timed_in_every_round_and_dense_is_always_there() -> None:
    methods: dict[str, Candidate] = {"matched": MATCHED, "ToMe": Merging(ToMe(0.5))}
    seen: list[tuple[str, int, int]] = []
    setup = Setup.of("tiny", size=(64, 64), device="cpu", repeats=2)
    report = bench(setup, methods, whole_images=False, memory=True, progress=lambda *told: seen.append(told))
    assert list(report.rows) == ["dense", "matched", "ToMe"]
    assert [name for name, *_ in seen] == 4 * ["dense", "matched", "ToMe"]  # to warm up, twice for time, for memory
    assert seen[-1][1:] == (12, 12)
    for name, row in report.rows.items():
        assert 0 < row.time.low <= row.time.median <= row.time.high
        assert (row.ratio == (1, 1, 1)) == (name == "dense")
        assert row.peak is not None
        assert row.peak > 0
    assert json.loads(json.dumps(report.as_dict()))["rows"]["matched"]["method"]["method"] == "matched"
    assert (report.timed, report.steps) == ("step", None)
    assert report.headline().startswith("a step with random weights of tiny, 64 x 64 pixels, batch 1 with guidance")
    assert bench_chart(report).width > bench_chart(report).height


def test_whole_images_are_what_a_pipeline_draws_with_each_method() -> None:
    drawn: dict[str, Any] = {}
    pipe = load_pipeline("tiny", device="cpu")
    before = snapshot(pipe.unet)

    class Kept:
        unet = pipe.unet

        def __call__(self, **call: Any) -> Any:
            images = pipe(**call, output_type="pt").images
            drawn[f"{call['num_inference_steps']} steps" if not atedm.is_applied(pipe.unet) else "pruned"] = images
            return images

    methods: dict[str, Candidate] = {"dense": Dense(), "half": Dense(0.5), "matched": MATCHED}
    call = {"prompt": ["a duck"], "guidance_scale": 0.0}
    took = images_in_turns(Kept(), call, methods, 2, 1, silent, memory=True)
    assert all(len(times) == 1 and peak for times, peak in took.values())

    def alone(steps: int) -> Tensor:
        noise = torch.Generator("cpu").manual_seed(0)
        images: Tensor = pipe(**call, num_inference_steps=steps, generator=noise, output_type="pt").images
        return images

    assert torch.equal(drawn["2 steps"], alone(2))
    assert torch.equal(drawn["1 steps"], alone(1))
    with atedm.pruned(pipe, "matched"):
        assert torch.equal(drawn["pruned"], alone(2))
    assert snapshot(pipe.unet) == before


def test_rounds_are_late_steps_of_one_run_so_that_what_is_remembered_is_at_hand() -> None:
    unet = small_unet()
    before = snapshot(unet)
    methods: dict[str, Candidate] = {"dense": Dense(), "own": MATCHED, "early": PAPER}
    seen: dict[str, list[tuple[bool, bool]]] = {}
    make = bench_module.copy_with_shared_weights

    def watched_copy(unet: Any) -> Any:
        copied = make(unet)

        def see(copied: Any, *_: Any) -> None:
            state = vars(copied).get("_atedm")
            if state is not None:
                memory = copied.get_submodule(state.spans[0])._atedm.memory
                name = "own" if state.method.remembers else "early"
                seen.setdefault(name, []).append((memory.last is not None, state.early))

        copied.register_forward_hook(see)
        assert all(a is b for a, b in zip(copied.parameters(), unet.parameters(), strict=True))
        return copied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "copy_with_shared_weights", watched_copy)
        took = steps_in_turns(unet, inputs(unet), methods, 2, silent)
    assert {name: (len(times), peak) for name, (times, peak) in took.items()} == dict.fromkeys(methods, (2, None))
    assert seen == {"own": [(True, False)] * 3, "early": [(False, False)] * 3}
    assert snapshot(unet) == before


def test_a_turn_of_what_works_in_cycles_is_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def counted(unet: Any, call: Any, method: Candidate, steps: int) -> Iterator[Any]:
        name = str(method.as_dict())
        yield lambda: calls.append(name)

    monkeypatch.setattr(bench_module, "run_of_steps", counted)
    kept, known = (Pruning(Variant(refresh_every=steps)) for steps in (2, 1000))
    both = Stacked((kept, Caching(3)))
    methods: dict[str, Candidate] = {
        "dense": Dense(), "cached": Caching(3), "kept": kept, "known": known, "both": both,
    }  # fmt: skip
    steps_in_turns(small_unet(), {"sample": None}, methods, 1, silent)
    counts = {name: calls.count(str(method.as_dict())) for name, method in methods.items()}
    assert counts == {"dense": 2, "cached": 6, "kept": 4, "known": 2, "both": 12}


def test_the_cost_of_a_step_is_that_of_one_in_which_nothing_is_spared() -> None:
    arch = architecture("tiny")
    unet, call = arch.on_meta(), arch.call((64, 64))
    figures = cost("tiny", "paper", size=(64, 64)).figures()
    assert late_step_cost(unet, call, PAPER) == pytest.approx(figures.normal_step / figures.dense)
    assert late_step_cost(unet, call, Dense()) == 1
    always, early = (Merging(ToMe(0.5, early_share=share)) for share in (0.0, 0.3))
    assert late_step_cost(unet, call, early) == late_step_cost(unet, call, always)
    assert late_step_cost(unet, call, Caching(2)) < 0.6


def test_weights_are_random_unless_they_are_there_and_the_model_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[Any] = []

    def noted(*args: Any) -> nn.Module:
        kept.append(random_unet(*args))
        kept.append(snapshot(kept[0]))
        return kept[0]

    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((weights_folder() / "unet" / "config.json").read_text())
    monkeypatch.setattr(bench_module, "random_unet", noted)
    options: dict[str, Any] = {"size": (64, 64), "device": "cpu", "guidance": False, "repeats": 1}
    report = bench(Setup.of(str(tmp_path), dtype="bfloat16", **options), {"matched": MATCHED})
    assert (report.timed, report.setup.dtype, report.rows["dense"].peak) == ("step", "bfloat16", None)
    assert snapshot(kept[0]) == kept[1]
    report = bench(Setup.of(str(weights_folder()), **options), {"matched": MATCHED}, steps=1)
    assert (report.timed, report.steps) == ("image", 1)


def test_what_a_step_does_not_show_is_refused() -> None:
    setup = Setup.of("tiny", device="cpu")
    with pytest.raises(ValueError, match="fewer steps"):
        bench(setup, {"it": Dense(0.5)}, whole_images=False)
    with pytest.raises(ValueError, match="both takes fewer steps"):
        bench(setup, {"matched": MATCHED, "both": Stacked((Dense(0.75), MATCHED))}, whole_images=False)
    with pytest.raises(ValueError, match="steps must be"):
        bench(setup, {}, steps=0)
    for name in ("repeats", "batch"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Setup.of("tiny", **{name: 0})  # type: ignore[arg-type]


def test_a_peak_is_what_a_call_holds_beyond_what_was_held() -> None:
    x = torch.zeros(250_000)

    def step() -> Tensor:
        y = x + 1
        z = y * 2
        del y
        return z.add_(1).view(-1) + 1

    assert peak_of(step, torch.device("cpu")) == pytest.approx(2_000_000, abs=64)  # the numbers are tensors too
    assert peak_of(step, torch.device("meta")) is None


def test_laps_of_a_name_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 3.5, 4.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        watch.lap(name)
    assert watch.read() == {"a": 1500.0, "b": 2000.0}
    assert Spread.of([3.0, 1.0, 2.0]).text() == "2.0 (1.0 to 3.0)"


# --- random weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_weights_run_and_stay_finite(dtype: torch.dtype) -> None:
    arch = architecture("tiny")
    unet = random_unet(arch, dtype)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert not unet.training
    with torch.no_grad():
        out = unet(timestep=1, **arch.call(device="cpu", dtype=dtype)).sample.float()
    assert out.isfinite().all()
    assert 0.05 < out.std() < 20


def test_random_weights_keep_the_variance_do_not_repeat_and_are_told_by_their_seed() -> None:
    unet, same, other = (random_unet(architecture("tiny"), seed=seed) for seed in (0, 0, 1))
    seen = set()
    for (name, parameter), twin, another in zip(
        unet.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, twin)
        if parameter.ndim == 1:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
            continue
        assert not torch.equal(parameter, another)
        rows = parameter.detach().flatten(1)
        if rows.numel() > 4000:
            assert float(rows.std()) == pytest.approx(rows.shape[1] ** -0.5, rel=0.1)
            assert len(rows.unique(dim=0)) == len(rows)
        seen.add(tuple(rows.flatten()[:8].mul(rows.shape[1] ** 0.5).tolist()))
    assert len(seen) == sum(parameter.ndim > 1 for parameter in unet.parameters())


def test_a_weight_larger_than_the_noise_is_filled_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atedm.lab.random_unet._NOISE", 101)
    weight = random_unet(architecture(small_unet())).conv_in.weight.detach().flatten()  # 16 x 4 x 3 x 3
    assert torch.equal(weight[:101], weight[101:202])
    assert torch.equal(weight[505:576], weight[:71])


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_writes_json_and_draws(tmp_path: Path) -> None:
    out, plot = tmp_path / "a" / "b.json", tmp_path / "c" / "d.png"
    arguments = ["bench", "matched,deepcache", "--repeats", "1", "--steps", "2", "--out", str(out), "--plot", str(plot)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "| matched | 0." in done.output
    assert "| method | cost | ms, image | time, dense = 1 |" in done.output
    assert json.loads(out.read_text())["rows"].keys() == {"dense", "matched", "deepcache"}
    assert plot.exists()


def test_the_defaults_are_quick_and_say_how_to_ask_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    real = bench

    def noted(setup: Setup, methods: Any, **options: Any) -> Any:
        asked.update(options, repeats=setup.repeats, methods=len(methods))
        return real(Setup.of("tiny", size=(64, 64), repeats=1), {}, whole_images=False)

    monkeypatch.setattr(bench_module, "bench", noted)
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 0, done.output
    rounds = asked["methods"] * (asked["repeats"] + 1)
    assert rounds * asked["steps"] <= 160  # steps of the shipped model, of which two cores take several a second
    assert "More: --steps 20 --repeats 5" in done.output.splitlines()[-1]
