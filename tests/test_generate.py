"""Generating: what lands in the folder, on the model that ships."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import atedm
from atedm.costs.fit import mean_share
from atedm.files import check_writable, remove_partials, save_image, save_json
from atedm.generate import generate, shown_beside, within_budget
from atedm.patching.survey import find_unet
from atedm.pipelines import load_pipeline, native_size
from atedm.request import Request
from atedm.run_file import read_run_file
from models import run, sdxl_pipeline, sdxl_unet

PROMPTS = ("a red circle above a blue square", "a yellow ring on a pink background")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


def request_for(**changes: Any) -> Request:
    return Request(**{"prompts": PROMPTS, "config": atedm.PRESETS["paper"], "steps": 4, "seed": 3} | changes)


def test_a_run_can_be_repeated_from_its_run_file(pipe: Any, tmp_path: Path) -> None:
    made = generate(pipe, request_for(), tmp_path / "first", compare=True, maps=True, model="tiny")
    names = {file.name for file in (tmp_path / "first").iterdir()}
    both = {f"{kind}-{i}.png" for kind in ("pruned", "dense", "maps") for i in (0, 1)}
    assert names == both | {"comparison.png", "run.json"}
    run = json.loads((tmp_path / "first" / "run.json").read_text())
    asked = run["request"]
    config = atedm.PruningConfig(**asked.pop("config"))
    again = Request(**asked | {"prompts": tuple(asked["prompts"]), "config": config})
    generate(pipe, again, tmp_path / "again")
    for i in (0, 1):
        first, second = ((tmp_path / run / f"pruned-{i}.png").read_bytes() for run in ("first", "again"))
        assert first == second
    assert [image["seed"] for image in run["images"]] == [3, 4]
    assert all(image.psnr_to_dense is not None and image.psnr_to_dense < 99 for image in made)
    assert not atedm.is_applied(pipe)


def test_the_kept_share_is_what_the_schedule_says(pipe: Any, tmp_path: Path) -> None:
    made = generate(pipe, request_for(prompts=PROMPTS[:1], steps=10), tmp_path)
    summary = atedm.apply(pipe)
    atedm.remove(pipe)
    assert made[0].kept_share == pytest.approx(summary.kept_share(10), abs=1e-4)


def test_gradual_pruning_is_recorded_and_drawn_on_the_whole_grid(pipe: Any, tmp_path: Path) -> None:
    config = atedm.PruningConfig(gradual=((0, 0.5), (1, 0.5)), schedule="constant", where="not-second-level")
    with atedm.pruned(pipe, config), atedm.recorded(pipe) as recording:
        pipe(PROMPTS[0], num_inference_steps=2, guidance_scale=3.0)
    first, second = recording.observations[:2]
    assert (first.layer, second.layer) == (0, 1)
    assert (first.keep.shape[1], second.keep.shape[1]) == (32, 16)
    assert first.importance.shape == second.importance.shape == (2, 64)
    for element in (0, 1):
        assert set(second.keep[element].tolist()) < set(first.keep[element].tolist())
    assert recording.kept_share == 0.25
    generate(pipe, request_for(prompts=PROMPTS[:1], config=config), tmp_path, compare=True, maps=True)
    assert (tmp_path / "maps-0.png").exists()


@pytest.mark.parametrize(
    ("config", "name", "other", "cost"),
    [("dagger", "", "Matched pruning", 0.89), ("matched", "", "AT-EDM", None), ("paper", "dagger", "AT-EDM", 0.83)],
)
def test_another_way_is_shown_beside_at_the_same_cost(
    pipe: Any, tmp_path: Path, config: str, name: str, other: str, cost: float | None
) -> None:
    request = shown_beside(pipe, request_for(prompts=PROMPTS[:1], config=atedm.PRESETS[config], steps=10), name)
    assert request.beside is not None
    assert request.beside.method_name == other
    mine, theirs = (mean_share(pipe, each, steps=10) for each in (request.config, request.beside))
    if cost is not None:
        assert theirs == pytest.approx(mine, abs=0.02) == pytest.approx(cost, abs=0.02)
    else:
        assert request.beside == atedm.PRESETS["paper"]  # which does not come down to that
    (made,) = generate(pipe, request, tmp_path, compare=True)
    assert made.beside is not None
    assert made.beside.psnr_to_dense not in (None, made.psnr_to_dense)
    assert {file.name for file in tmp_path.iterdir()} >= {"beside-0.png", "pruned-0.png", "comparison.png"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert atedm.PruningConfig(**run["request"]["beside"]) == request.beside
    assert not atedm.is_applied(pipe)


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


def test_a_model_for_oblong_images_draws_them_where_no_size_is_asked_for() -> None:
    pipe = sdxl_pipeline(unet=sdxl_unet(sample_size=(16, 24)))
    factor = pipe.vae_scale_factor
    assert native_size(pipe) == (24 * factor, 16 * factor)
    found = within_budget(pipe, Request(("a",), atedm.PRESETS["matched"], steps=4), 0.7)
    assert 0.68 < mean_share(pipe, found.config, size=native_size(pipe), steps=4) <= 0.7


def test_rate_zero_is_the_dense_image(pipe: Any, tmp_path: Path) -> None:
    config = atedm.PruningConfig(pruning_rate=0.0)
    made = generate(pipe, request_for(prompts=PROMPTS[:1], config=config), tmp_path, compare=True, maps=True)
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
    generate(pipe, request_for(steps=1, beside=atedm.PRESETS["matched"]), tmp_path, compare=True, maps=True)
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


@pytest.mark.parametrize(("writer", "stays"), [("1", True), ("999999999", False), ("x", False)])
def test_what_another_process_is_writing_is_left_alone(writer: str, stays: bool, tmp_path: Path) -> None:
    partial = tmp_path / f".00000.png.{writer}.partial"
    partial.touch()
    remove_partials(tmp_path)
    assert partial.exists() == stays


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (8, 8))
    save_image(image, tmp_path / "image.png")
    before = (tmp_path / "image.png").read_bytes()

    def break_off(self: Image.Image, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_image(image, tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == before


def test_links_are_followed_and_pipes_take_what_comes(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "it.json")
    save_json([1], tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "elsewhere" / "it.json").read_text()) == [1]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        save_json([2], tmp_path / "pipe")
        assert json.loads(os.read(reader, 100)) == [2]
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="directory"):
        save_json([3], tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="named for two results"):
        check_writable(tmp_path / "a.png", None, tmp_path / "elsewhere" / ".." / "a.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "prompt is empty"),
        ({"prompts": ("a", " ")}, "prompt is empty"),
        ({"prompts": ("\udcff",)}, r"the prompt '\\udcff' is not text in UTF-8"),
        ({"steps": 0}, "steps must be at least 1"),
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
