"""Generating: what lands in the folder, on the model that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import atedm
from atedm.app.equal_cost import request_cost
from atedm.app.generate import generate
from atedm.app.models import load_pipeline
from atedm.app.request import Request
from atedm.app.run_file import read_run_file
from atedm.hosts.unet_spans import find_unet

PROMPTS = ("a butterfly above a rose", "a pear on a pink background")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


def request_for(**changes: Any) -> Request:
    return Request(
        **{"prompts": PROMPTS, "method": atedm.AtEdm(), "steps": 4, "seed": 3, "width": 128, "height": 128} | changes
    )


def test_what_lands_in_the_folder(pipe: Any, tmp_path: Path) -> None:
    request = request_for(other=atedm.Matched())
    made = generate(pipe, request, tmp_path, compare=True, maps=True, model="tiny")
    names = {file.name for file in tmp_path.iterdir()}
    each = {f"{kind}-{i}.png" for kind in ("pruned", "dense", "other", "maps") for i in (0, 1)}
    assert names == each | {"comparison.png", "run.json"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert [image["seed"] for image in run["images"]] == [3, 4]
    assert run["cost"] == round(request_cost(pipe, request), 4)
    for image, written in zip(made, run["images"], strict=True):
        assert image.other is not None
        assert image.psnr_to_dense not in (None, image.other.psnr_to_dense)
        assert written == vars(image) | {"other": vars(image.other)}
    assert not atedm.is_applied(pipe)


def test_the_kept_share_is_what_the_schedule_says(pipe: Any, tmp_path: Path) -> None:
    made = generate(pipe, request_for(prompts=PROMPTS[:1], steps=10), tmp_path)
    summary = atedm.apply(pipe, "paper")
    atedm.remove(pipe)
    assert made[0].kept_share == pytest.approx(summary.kept_share(10), abs=5e-3)  # of another size


def test_rate_zero_is_the_dense_image(pipe: Any, tmp_path: Path) -> None:
    request = request_for(prompts=PROMPTS[:1], method=atedm.AtEdm(rate=0.0))
    made = generate(pipe, request, tmp_path, compare=True, maps=True)
    assert (tmp_path / "dense-0.png").read_bytes() == (tmp_path / "pruned-0.png").read_bytes()
    assert made[0].kept_share == 1.0
    assert (tmp_path / "comparison.png").exists()


def test_other_sizes(pipe: Any, tmp_path: Path) -> None:
    generate(pipe, request_for(prompts=PROMPTS[:1], width=160, height=96), tmp_path)
    assert Image.open(tmp_path / "pruned-0.png").size == (160, 96)


def test_a_run_that_fails_in_the_middle_leaves_a_clean_pipeline(pipe: Any, tmp_path: Path) -> None:
    def stop(what: str, step: int, steps: int) -> None:
        if what == "pruned 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, request_for(), tmp_path, progress=stop)
    assert not atedm.is_applied(pipe)
    assert not find_unet(pipe)._forward_hooks
    assert {file.name for file in tmp_path.iterdir()} == {"pruned-0.png", "run.json"}
    assert [made["file"] for made in json.loads((tmp_path / "run.json").read_text())["images"]] == ["pruned-0.png"]
    _, again = read_run_file(tmp_path / "run.json")
    assert again == request_for()


def test_images_of_an_earlier_run_make_room(pipe: Any, tmp_path: Path) -> None:
    mine = {"mine.png", "pruned-0-favourite.png", "maps-of-paris.png"}
    for name in mine:
        (tmp_path / name).write_bytes(b"kept")
    generate(pipe, request_for(steps=1, other=atedm.Matched()), tmp_path, compare=True, maps=True)
    generate(pipe, request_for(prompts=PROMPTS[:1], steps=1), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"pruned-0.png", "run.json", *mine}


def test_an_earlier_run_stays_until_there_is_an_image_to_take_its_place(pipe: Any, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def stop_at_second(what: str, *_: Any) -> None:
        if what.endswith("1"):
            raise KeyboardInterrupt

    Image.new("L", (8, 8), 255).save(tmp_path / "everything.png")
    generate(pipe, request_for(steps=1), tmp_path, compare=True)
    before = content()
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, request_for(steps=1, seed=9), tmp_path, progress=stop)
    with pytest.raises(ValueError, match=r"tokens of .* are protected"):
        generate(pipe, request_for(steps=1, protect=str(tmp_path / "everything.png")), tmp_path, compare=True)
    assert content() == before
    _, again = read_run_file(tmp_path / "run.json")
    with pytest.raises(KeyboardInterrupt):  # a run drawn again in its own folder
        generate(pipe, again, tmp_path, progress=stop_at_second)
    assert set(content()) == {"pruned-0.png", "run.json", "everything.png"}
    assert read_run_file(tmp_path / "run.json")[1] == again


def test_a_run_is_drawn_again_with_the_mask_beside_it(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 20, 20))
    mask.save("mask.png")
    generate(pipe, request_for(steps=2, protect="mask.png"), Path("out"))
    Path("mask.png").unlink()
    monkeypatch.chdir(tmp_path)
    _, again = read_run_file(Path("here/out/run.json"))
    generate(pipe, again, Path("again"))
    for index in range(len(PROMPTS)):
        assert Path(f"again/pruned-{index}.png").read_bytes() == Path(f"here/out/pruned-{index}.png").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "prompt is empty"),
        ({"prompts": ("a", " ")}, "prompt is empty"),
        ({"prompts": ("\udcff",)}, r"the prompt '\\udcff' is not text in UTF-8"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"guidance": float("nan")}, "guidance must be 0 or more"),
        ({"width": 100}, "width must be a multiple of 8"),
        ({"height": 8}, "height must be a multiple of 8"),
    ],
)
def test_bad_requests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_for(**change)


def test_a_region_is_protected_and_kept_beside_the_images(pipe: Any, tmp_path: Path) -> None:
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 2, 8))
    half.save(tmp_path / "half.png")
    request = request_for(protect=str(tmp_path / "half.png"), steps=2)
    generate(pipe, request, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["request"]["protect"] == str(tmp_path / "half.png")
    assert (np.array(Image.open(tmp_path / "out" / "protect.png")) == np.array(half)).all()
    generate(pipe, request_for(steps=2), tmp_path / "without")
    images = [np.array(Image.open(tmp_path / folder / "pruned-0.png")) for folder in ("out", "without")]
    assert (images[0] != images[1]).any()


def test_a_mask_that_cannot_be_read_is_said_before_anything_is_drawn(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        generate(pipe, request_for(protect="nowhere.png"), tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png is no picture"):
        generate(pipe, request_for(protect=str(tmp_path / "text.png")), tmp_path)
    assert not list(tmp_path.glob("pruned-*"))
