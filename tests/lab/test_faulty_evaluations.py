"""Faults: an evaluation that is killed or given broken files goes on to the same, or ends in one clear line."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from atedm.app.models import load_pipeline
from atedm.lab.evaluation.images import Drawing
from atedm.lab.evaluation.prompts import read_prompts
from atedm.lab.evaluation.run import evaluate
from atedm.lab.evaluation.scoring import Metrics
from atedm.lab.methods.by_name import method_by_name
from coco import coco_folder
from faults import broken, command, faults, killed, largest_file, pictures, whole_files

PROMPTS = read_prompts("scenes", 4, 0)
METHODS = {name: method_by_name(name) for name in ("dense", "matched")}
SHORT = ("--captions", 2, "--steps", 1, "--size", "128x128", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("tiny", device="cpu")


def evaluated(pipe: Any, out: Path) -> list[dict[str, Any]]:
    """A short evaluation; its results."""
    drawing = Drawing(steps=1, guidance=1.0, batch=2, width=128, height=128)
    results = evaluate(pipe, METHODS, PROMPTS, drawing, Metrics(names=("distance", "accuracy")), out)
    return [result.as_dict(results[0]) for result in results]


def test_an_evaluation_that_is_killed_goes_on_to_the_same(tiny: Any, tmp_path: Path) -> None:
    undisturbed = evaluated(tiny, tmp_path / "undisturbed")
    images = pictures(tmp_path / "undisturbed")
    for number, chance in enumerate(faults("evaluate killed", 0.2)):
        out = tmp_path / str(number)
        for _ in range(chance.choice([1, 1, 2])):  # now and then killed again when it goes on
            killed(lambda out=out: evaluated(tiny, out), 9, 3.0, chance)  # type: ignore[misc]
            for file in whole_files(out) if out.exists() else ():
                assert images.get(str(file.relative_to(out)), file.read_bytes()) == file.read_bytes()
        assert evaluated(tiny, out) == undisturbed
        assert pictures(out) == images
        assert not list(out.rglob(".*.partial"))
        shutil.rmtree(out)


def test_on_a_full_disk_a_run_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    run_it = ("evaluate", "dense,matched", *SHORT, "--metrics", "distance")
    assert command(*run_it, "--out", "undisturbed", folder=tmp_path).status == 0
    undisturbed = pictures(tmp_path / "undisturbed")
    for number, chance in enumerate(faults("disk full", 0.06)):
        out = tmp_path / str(number)
        said = command(*run_it, "--out", out, folder=tmp_path, before=largest_file(chance.randrange(0, 12_000)))
        assert said.in_one_line, said.err
        assert "cannot write" in said.err
        assert "File too large" in said.err
        assert not list(out.rglob(".*.partial"))
        for file in whole_files(out) if out.exists() else ():
            assert undisturbed.get(str(file.relative_to(out)), b"") in (b"", file.read_bytes())
        assert command(*run_it, "--out", out, folder=tmp_path).status == 0
        assert pictures(out) == undisturbed


@pytest.mark.parametrize("place", ["/proc/atedm", "file/out"])
def test_where_no_evaluation_can_be_written_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = command("evaluate", "dense", *SHORT, "--metrics", "accuracy", "--out", place, folder=tmp_path)
    assert said.in_one_line, said.err
    assert place in said.err


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "--plot"),
        ("bench", "--out"),
        *(("lab", name, "--plot") for name in ("latency", "variance", "objects", "errors", "scaling")),
    ],
    ids=" ".join,
)
def test_where_no_result_can_be_written_is_told_before_any_work(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in ("/proc/atedm/x.png", "file/x.png", "."):
        start = time.monotonic()
        said = command(*words, place, folder=tmp_path)
        assert said.in_one_line, said.err
        assert f"cannot write {place}" in said.err
        assert time.monotonic() - start < 20  # not the minutes that each of them takes
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_a_run_wrote_and_somebody_broke_is_told_or_made_again(tmp_path: Path) -> None:
    run_it = ("evaluate", "dense,matched", *SHORT, "--metrics", "distance,accuracy,clip,fid", "--out", "out")
    assert command(*run_it, folder=tmp_path).status == 0
    (report,) = (tmp_path / "out").glob("*.json")
    results = report.read_text()
    files = sorted(file for file in (tmp_path / "out").rglob("*") if file.suffix in (".png", ".json"))
    for number, chance in enumerate(faults("result file broken", 0.12)):
        file = files[number % len(files)]
        whole = file.read_bytes()
        file.write_bytes(broken(whole, chance))
        said = command(*run_it, folder=tmp_path)
        if said.status == 0:
            assert report.read_text() == results
        else:
            assert said.in_one_line, said.err
            assert file.name in said.err, (file, said.err)
            file.write_bytes(whole)


def test_pictures_and_captions_that_are_broken_are_told(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    folder = coco_folder(tmp_path / "coco")
    (tmp_path / "prompts.csv").write_text('prompt\na duck\n"a, quoted"\n')
    common = ("--steps", 1, "--device", "cpu", "--out", "out")
    score = ("--captions", 2, "--metrics", "distance,fid", "--fid-features", "tiny")
    asked: dict[Path, tuple[Any, ...]] = {
        folder / "annotations" / "captions_val2017.json": ("evaluate", "dense", "--prompts", folder, *score, *common),
        folder / "val2017" / "000000000003.jpg": ("evaluate", "dense", "--prompts", folder, *score, *common),
        tmp_path / "prompts.csv": ("evaluate", "dense", "--prompts", "prompts.csv", "--metrics", "distance", *common),
    }
    for number, chance in enumerate(faults("input file broken", 0.1)):
        file = [*asked][number % len(asked)]
        whole = file.read_bytes()
        file.write_bytes(broken(whole, chance))
        said = command(*asked[file], folder=tmp_path)
        assert said.status == 0 or said.in_one_line, said.err
        assert said.status == 0 or file.name in said.err or str(folder) in said.err, said.err
        file.write_bytes(whole)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
