"""Faults: a run that is killed, cut short or given broken files leaves whole files and ends in one clear line."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atedm.app.generate import generate
from atedm.app.models import load_pipeline
from atedm.app.request import Request
from atedm.method.at_edm import DAGGER
from atedm.tiny import weights_folder
from faults import broken, command, faults, killed, pictures, whole_files

PROMPTS = ("a butterfly above a rose", "a castle")
ONE_IMAGE = ("generate", "a duck", "--steps", 1, "--size", "64x64", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("tiny", device="cpu")


def run_once(pipe: Any, out: Path) -> None:
    generate(pipe, Request(PROMPTS, DAGGER, steps=1, guidance=1.0), out, compare=True, maps=True)


def test_a_run_that_is_killed_leaves_whole_files_and_can_be_run_again(tiny: Any, tmp_path: Path) -> None:
    run_once(tiny, tmp_path / "undisturbed")
    images = pictures(tmp_path / "undisturbed")
    for number, chance in enumerate(faults("generate killed", 0.14)):
        out = tmp_path / str(number)
        killed(lambda out=out: run_once(tiny, out), 8, 2.0, chance)  # type: ignore[misc]
        for file in whole_files(out) if out.exists() else ():
            assert images.get(str(file.relative_to(out)), file.read_bytes()) == file.read_bytes()
        run_once(tiny, out)
        assert pictures(out) == images


def test_a_file_system_that_is_full_is_told(tiny: Any, tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    try:
        with pytest.raises(OSError, match=r"cannot write .*small.*: No space left on device"):
            run_once(tiny, mounted / "out")
        assert not list(mounted.rglob(".*.partial"))
        assert list(whole_files(mounted))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("place", ["/proc/atedm", "/sys/atedm", "file/out"])
def test_where_nothing_can_be_written_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = command(*ONE_IMAGE, "--out", place, folder=tmp_path)
    assert said.in_one_line, said.err
    assert place in said.err


@pytest.mark.parametrize("place", ["/proc/atedm/x.png", "file/x.png", "."])
def test_where_no_chart_can_be_written_is_told_before_any_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    start = time.monotonic()
    said = command("cost", "--plot", place, folder=tmp_path)
    assert said.in_one_line, said.err
    assert f"cannot write {place}" in said.err
    assert time.monotonic() - start < 20
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_weights_and_configs_that_are_broken_are_told(tmp_path: Path) -> None:
    model = Path(shutil.copytree(weights_folder(), tmp_path / "model"))
    files = sorted(file for file in model.rglob("*") if file.is_file() and file.suffix in (".safetensors", ".json"))
    encoders = ("text_encoder", "text_encoder_2")
    files = [file for file in files if file.parent.name in ("model", "unet", "vae", "scheduler", "tokenizer")] + [
        file for file in files if file.parent.name in encoders
    ]
    for number, chance in enumerate(faults("model file broken", 0.2)):
        file = files[number % len(files)]
        whole = file.read_bytes()
        file.write_bytes(broken(whole, chance))
        out = tmp_path / f"out-{number}"
        said = command(*ONE_IMAGE, "--model", model, "--out", out, folder=tmp_path)
        if said.status == 0:  # it did not need what was broken
            with Image.open(out / "pruned-0.png") as picture:
                assert picture.convert("RGB").size == (64, 64)
            is_weights = file.suffix == ".safetensors" and file.parent != model  # where a judge lies that draws nothing
            assert not is_weights or file.stat().st_size == len(whole), f"{file} was cut and taken all the same"
        else:
            assert said.in_one_line, said.err
        file.write_bytes(whole)


def test_a_mask_that_is_broken_is_told(tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(mask)
    whole = mask.read_bytes()
    for chance in faults("mask broken", 0.1):
        mask.write_bytes(broken(whole, chance))
        said = command(*ONE_IMAGE, "--protect", "mask.png", "--out", "out", folder=tmp_path)
        assert said.status == 0 or said.in_one_line, said.err
        assert said.status == 0 or mask.name in said.err or "protected" in said.err, said.err
