"""What stands behind the page, without a browser: jobs that stream and stop, what is checked, who is let in."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import atedm
from atedm.costs.fit import mean_share
from atedm.request import Request
from atedm.web.job import Done, Drawn, Step, Stopped, run_job
from atedm.web.messages import complaint, message
from atedm.web.serve import is_loopback, serve
from atedm.web.studio import Studio, checked_models
from models import sdxl_pipeline, sdxl_unet

CIRCLE = "a red circle above a blue square"

pytestmark = pytest.mark.xdist_group("web")  # two pages at once would look for the same port


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(("tiny",), tmp_path_factory.mktemp("web"))


def one_layer_unet() -> Any:
    return sdxl_unet(transformer_layers_per_block=(1, 1, 1))


def asked(studio: Studio, **changes: Any) -> Request:
    values = {
        "model": "tiny",
        "prompt": CIRCLE,
        "method": "matched",
        "cost": 70,
        "steps": 3,
        "guidance": 3.0,
        "seed": 5,
    }
    return studio.request(**(values | changes))


def test_a_job_tells_of_every_step_and_image_and_leaves_a_run_file(studio: Studio) -> None:
    events = list(studio.draw("someone", "tiny", asked(studio)))
    steps = [(event.way, event.step) for event in events if isinstance(event, Step)]
    assert steps == [(way, step) for way in ("dense", "pruned") for step in (1, 2, 3)]
    dense, pruned = (event for event in events if isinstance(event, Drawn))
    assert (dense.way, dense.recording, pruned.way) == ("dense", None, "pruned")
    assert {seen.step for seen in pruned.recording.observations} == {0, 1, 2}
    assert isinstance(events[-1], Done)
    run = json.loads((events[-1].folder / "run.json").read_text())
    assert run["request"]["prompts"] == [CIRCLE]
    assert run["images"][0]["seed"] == 5
    assert events[-1].folder.parent == studio.folder


def test_the_cost_of_the_slider_is_the_cost_of_the_run(studio: Studio) -> None:
    offered = studio.cost_range("tiny", "matched", 3)
    for cost in (offered.lowest, 70, offered.highest):
        share = mean_share(studio.pipe("tiny"), asked(studio, cost=cost).config, steps=3)
        assert cost / 100 - 0.01 < share <= cost / 100


def test_a_preset_is_taken_as_it_is_where_the_slider_was_left_alone(studio: Studio) -> None:
    for method in studio.methods("tiny").values():
        usual = studio.cost_range("tiny", method, 3).usual
        assert asked(studio, method=method, cost=usual).config == atedm.PRESETS[method]


def test_a_job_that_is_stopped_leaves_nothing_behind(studio: Studio) -> None:
    before = set(studio.folder.iterdir())

    def draw() -> None:
        for event in studio.draw("someone", "tiny", asked(studio, steps=40)):
            if isinstance(event, Step) and (event.way, event.step) == ("pruned", 2):
                assert studio.stop("someone")

    with pytest.raises(Stopped, match=r"stopped at step \d+ of 40, pruned"):
        draw()
    assert set(studio.folder.iterdir()) == before
    assert not atedm.is_applied(studio.pipe("tiny"))
    assert not studio.stop("someone")


def test_a_job_that_nobody_listens_to_any_more_ends(studio: Studio) -> None:
    before = set(studio.folder.iterdir())
    job = studio.draw("someone", "tiny", asked(studio, steps=100))
    next(job)
    job.close()
    assert not any(thread.name == "atedm-job" for thread in threading.enumerate())
    assert set(studio.folder.iterdir()) == before
    assert not atedm.is_applied(studio.pipe("tiny"))


def test_stopping_one_visitor_leaves_the_others(studio: Studio) -> None:
    job = studio.draw("someone", "tiny", asked(studio, steps=1))
    next(job)
    assert not studio.stop("another")
    assert isinstance(list(job)[-1], Done)


def test_costs_are_told_while_another_visitor_draws(studio: Studio) -> None:
    job = studio.draw("someone", "tiny", asked(studio, steps=2))
    next(job)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(studio.cost_range, "tiny", "dagger", 2).result(timeout=20).usual < 100
    assert isinstance(list(job)[-1], Done)


def test_an_error_of_the_model_reaches_the_page(tmp_path: Path) -> None:
    pipe = sdxl_pipeline(one_layer_unet())
    request = Request((CIRCLE,), atedm.PruningConfig(), steps=1)
    with pytest.raises(ValueError, match="nothing to prune"):
        list(run_job(pipe, request, tmp_path / "job", "sd1", threading.Event()))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("changes", "complains"),
    [
        ({"prompt": " \n"}, "The prompt is empty"),
        ({"prompt": "x" * 1001}, "1001 characters; at most 1000"),
        ({"prompt": None}, "The prompt is empty"),
        ({"steps": 0}, "Steps must be from 1 to 100, not 0"),
        ({"steps": 101}, "Steps must be from 1 to 100, not 101"),
        ({"guidance": float("nan")}, "Guidance must be from 0 to 30, not nan"),
        ({"seed": -1}, "The seed must be from 0"),
        ({"seed": None}, "The seed must be from 0"),
        ({"cost": 3}, "The cost must be from"),
        ({"cost": True}, "The cost must be from"),
        ({"method": "random"}, "unknown method 'random'"),
        ({"model": "/etc/passwd"}, "unknown model '/etc/passwd'"),
        ({"model": "../tiny"}, "unknown model '../tiny'"),
    ],
)
def test_the_server_checks_for_itself(studio: Studio, changes: dict[str, Any], complains: str) -> None:
    with pytest.raises(ValueError, match=complains):
        asked(studio, **changes)


@pytest.mark.parametrize("steps", [None, 0, float("nan"), "x", 1000])
def test_an_emptied_box_of_steps_is_told(studio: Studio, steps: Any) -> None:
    with pytest.raises(ValueError, match="Steps must be from 1 to"):
        studio.cost_range("tiny", "dagger", steps)


def test_a_model_without_a_unet_is_told(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio, "pipe", lambda model: object())
    with pytest.raises(TypeError, match="object has no U-Net"):
        studio.cost_range("tiny", "dagger", 4)


def test_models_are_those_of_the_command_line() -> None:
    assert checked_models(["tiny", "a/b", "tiny"]) == ("tiny", "a/b")
    with pytest.raises(ValueError, match="at least one model"):
        checked_models([])


def test_few_step_models_are_offered_what_suits_them() -> None:
    few = Studio(("stabilityai/sdxl-turbo",), Path())
    assert [*few.methods("stabilityai/sdxl-turbo").values()] == ["matched", "turbo"]


def test_blocks_of_one_layer_are_pruned_inside_it(studio: Studio) -> None:
    one_layer = Studio(("sd",), studio.folder, _pipes={"sd": sdxl_pipeline(one_layer_unet())})
    usual = one_layer.cost_range("sd", "paper", 3).usual
    assert asked(one_layer, model="sd", method="paper", cost=usual).config.place == "after-self-attention"


def test_what_visitors_write_is_never_markup() -> None:
    for say in (message, complaint):
        assert "<b>" not in say("<b>bold</b>")


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("box", False),
    ],
)
def test_loopback_is_known(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_elsewhere_visitors_need_a_password_and_files_of_the_machine_are_not_served(tmp_path: Path) -> None:
    served = serve(["tiny"], tmp_path / "runs", host="0.0.0.0")
    try:
        url = served.url.rstrip("/").replace("0.0.0.0", "127.0.0.1")
        assert served.password is not None
        assert len(served.password) >= 16
        with httpx.Client(base_url=url, trust_env=False) as visitor:
            assert visitor.get("/config").status_code == 401
            assert visitor.post("/login", data={"username": "atedm", "password": "guess"}).status_code == 400
            assert visitor.post("/login", data={"username": "atedm", "password": served.password}).status_code == 200
            assert visitor.get("/config").status_code == 200
            for path in ("/etc/passwd", str(Path(atedm.__file__)), str(tmp_path / "runs" / ".." / "other")):
                assert visitor.get(f"/gradio_api/file={path}").status_code in {403, 404}
    finally:
        served.close()
