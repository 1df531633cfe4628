"""What stands behind the page, without a browser: jobs that stream and stop, what is checked, who is let in."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import atedm
from atedm.app.request import Request
from atedm.costs.budget import run_cost
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Plan
from atedm.web.job import ImageDone, JobDone, StepDone, Stopped, run_job
from atedm.web.messages import complaint, message
from atedm.web.serve import is_loopback, serve
from atedm.web.service import Service
from models import sdxl_pipeline, sdxl_unet

CIRCLE = "a butterfly above a rose"

pytestmark = pytest.mark.xdist_group("web")  # two pages at once would look for the same port


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(("tiny",), tmp_path_factory.mktemp("web"))


def one_layer_unet() -> Any:
    return sdxl_unet(transformer_layers_per_block=(1, 1, 1))


def asked(service: Service, **changes: Any) -> Request:
    values = {
        "model": "tiny",
        "prompt": CIRCLE,
        "method": "matched",
        "cost": 70,
        "steps": 3,
        "guidance": 3.0,
        "seed": 5,
    }
    return service.request(**(values | changes))


def test_a_job_tells_of_every_step_and_image_and_leaves_a_run_file(service: Service) -> None:
    events = list(service.draw("someone", "tiny", asked(service)))
    steps = [(event.kind, event.step) for event in events if isinstance(event, StepDone)]
    assert steps == [(kind, step) for kind in ("dense", "pruned") for step in (1, 2, 3)]
    dense, pruned = (event for event in events if isinstance(event, ImageDone))
    assert (dense.kind, dense.recording, pruned.kind) == ("dense", None, "pruned")
    assert {seen.step for seen in pruned.recording.observations} == {0, 1, 2}
    assert isinstance(events[-1], JobDone)
    run = json.loads((events[-1].folder / "run.json").read_text())
    assert run["request"]["prompts"] == [CIRCLE]
    assert run["images"][0]["seed"] == 5
    assert events[-1].folder.parent == service.folder


def test_the_cost_of_the_slider_is_the_cost_of_the_run(service: Service) -> None:
    offered = service.cost_range("tiny", "matched", 3)
    for cost in (offered.lowest, 70, offered.highest):
        share = run_cost(service.pipe("tiny"), asked(service, cost=cost).method, steps=3)
        assert cost / 100 - 0.01 < share <= cost / 100


def test_a_method_is_taken_as_it_is_where_the_slider_was_left_alone(service: Service) -> None:
    for method in service.methods("tiny").values():
        usual = service.cost_range("tiny", method, 3).usual
        assert asked(service, method=method, cost=usual).method == atedm.METHODS[method]


def planned(folder: Path, **values: Any) -> Service:
    plan = Plan(fingerprint(atedm.load_pipeline("tiny")), 2, found={"cost": 0.42, "dense_steps": 3}, **values)
    return Service(("tiny",), folder, plan=plan)


@pytest.mark.parametrize("method", [None, atedm.Matched(0.5)], ids=["fewer steps", "pruned"])
def test_a_plan_is_offered_first_and_sets_steps_and_cost(method: Any, tmp_path: Path) -> None:
    service = planned(tmp_path, method=method)
    assert next(iter(service.methods("tiny").values())) == "plan"
    assert service.cost_range("tiny", "plan", 20).usual == 42
    request = asked(service, method="plan", steps=50, cost=99)
    assert (request.steps, request.dense_steps) == (2, 3)
    events = list(service.draw("someone", "tiny", request))
    steps = [(event.kind, event.step) for event in events if isinstance(event, StepDone)]
    assert steps == [("dense", 1), ("dense", 2), ("dense", 3), ("pruned", 1), ("pruned", 2)]
    assert isinstance(events[-1], JobDone)
    assert events[-1].result.psnr_to_dense is not None


def test_a_plan_for_another_model_is_refused_when_the_page_opens(tmp_path: Path) -> None:
    plan = Plan(fingerprint(atedm.load_pipeline("tiny")) | {"in_channels": 9}, 2)
    with pytest.raises(ValueError, match="this plan is for another model: its in_channels is 9"):
        serve(["tiny"], tmp_path, plan=plan)


def test_a_job_that_is_stopped_leaves_nothing_behind(service: Service) -> None:
    before = set(service.folder.iterdir())

    def draw() -> None:
        for event in service.draw("someone", "tiny", asked(service, steps=8)):
            if isinstance(event, StepDone) and (event.kind, event.step) == ("pruned", 2):
                assert service.stop("someone")

    with pytest.raises(Stopped, match=r"stopped at step \d+ of 8, pruned"):
        draw()
    assert set(service.folder.iterdir()) == before
    assert not atedm.is_applied(service.pipe("tiny"))
    assert not service.stop("someone")


def test_a_job_that_nobody_listens_to_any_more_ends(service: Service) -> None:
    before = set(service.folder.iterdir())
    job = service.draw("someone", "tiny", asked(service, steps=100))
    next(job)
    job.close()
    assert not any(thread.name == "atedm-job" for thread in threading.enumerate())
    assert set(service.folder.iterdir()) == before
    assert not atedm.is_applied(service.pipe("tiny"))


def test_stopping_one_visitor_leaves_the_others(service: Service) -> None:
    job = service.draw("someone", "tiny", asked(service, steps=1))
    next(job)
    assert not service.stop("another")
    assert isinstance(list(job)[-1], JobDone)


def test_costs_are_told_while_another_visitor_draws(service: Service) -> None:
    job = service.draw("someone", "tiny", asked(service, steps=2))
    next(job)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(service.cost_range, "tiny", "dagger", 2).result(timeout=20).usual < 100
    assert isinstance(list(job)[-1], JobDone)


def test_an_error_of_the_model_reaches_the_page(tmp_path: Path) -> None:
    pipe = sdxl_pipeline(one_layer_unet())
    request = Request((CIRCLE,), atedm.AtEdm(), steps=1)
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
def test_the_server_checks_for_itself(service: Service, changes: dict[str, Any], complains: str) -> None:
    with pytest.raises(ValueError, match=complains):
        asked(service, **changes)


@pytest.mark.parametrize("steps", [None, 0, float("nan"), "x", 1000])
def test_an_emptied_box_of_steps_is_told(service: Service, steps: Any) -> None:
    with pytest.raises(ValueError, match="Steps must be from 1 to"):
        service.cost_range("tiny", "dagger", steps)


def test_a_model_without_a_unet_is_told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "pipe", lambda model: object())
    with pytest.raises(TypeError, match="object has no U-Net"):
        service.cost_range("tiny", "dagger", 4)


def test_models_are_those_of_the_command_line() -> None:
    assert Service(("tiny", "a/b", "tiny"), Path()).models == ("tiny", "a/b")
    with pytest.raises(ValueError, match="at least one model"):
        Service((), Path())


def test_models_are_offered_the_methods_that_can_prune_them() -> None:
    offered = {"stabilityai/sdxl-turbo": ["matched", "turbo"], "sdxl": ["matched", "dagger", "paper"]}
    for model, names in offered.items():
        service = Service((model,), Path(), _pipes={model: sdxl_pipeline()})
        assert [*service.methods(model).values()] == names
    service = Service(("sd",), Path(), _pipes={"sd": sdxl_pipeline(one_layer_unet())})
    assert [*service.methods("sd").values()] == ["matched"]
    with pytest.raises(ValueError, match="unknown method 'paper'"):
        service.cost_range("sd", "paper", 3)


def test_the_method_that_suits_a_model_comes_first(service: Service) -> None:
    assert next(iter(service.methods("tiny").values())) == service.suits("tiny").method


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
