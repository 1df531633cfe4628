"""A run that draws, scores and compares: resumed, shared out, refused, and reported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from atedm import METHODS
from atedm.app.models import load_pipeline
from atedm.costs.tome import ToMe
from atedm.lab.ablation import Variant
from atedm.lab.evaluation.experiments import Experiment
from atedm.lab.evaluation.images import Drawing, image_file, image_files, missing_groups
from atedm.lab.evaluation.prompts import Prompt, read_prompts
from atedm.lab.evaluation.report import markdown_of, sheet_of, tables, write_report
from atedm.lab.evaluation.run import Outcome, evaluate, folder_name, run_experiment, setting_name
from atedm.lab.evaluation.scoring import Metrics, Scores, score
from atedm.lab.methods.candidates import Candidate, Dense, Pruning
from atedm.lab.methods.peers import Merging
from atedm.lab.scores.clip_score import TINY_CLIP
from atedm.lab.scores.pixels import distances, lpips_distances
from lpips_weights import keep_random_alexnet
from rendered_scenes import rendered_scenes

QUICK = Metrics(names=("distance", "accuracy"))
SIZE: dict[str, Any] = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny", device="cpu")


def run(pipe: Any, out: Path, count: int = 5, **changes: Any) -> list[Any]:
    methods: dict[str, Candidate] = {
        "dense": Dense(), "dagger": Pruning(METHODS["dagger"]), "tome": Merging(ToMe(0.5)),
    }  # fmt: skip
    drawing = Drawing(**{"steps": 2, "batch": 2, **SIZE, **changes})
    return evaluate(pipe, methods, read_prompts("scenes", count), drawing, QUICK, out)


def pixels(folder: Path, count: int = 5) -> list[bytes]:
    return [file.read_bytes() for file in image_files(folder, count)]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_to_the_same_images_and_figures(pipe: Any, tmp_path: Path) -> None:
    whole = run(pipe, tmp_path / "whole")
    for name in ("dense", "dagger", "tome"):
        # Of the groups 0-1, 2-3 and 4 one was cut through, one was never begun.
        for index in (1, 4):
            image_file(tmp_path / "whole" / "images" / name, index).unlink()
    kept = image_file(tmp_path / "whole" / "images" / "tome", 2)
    time = kept.stat().st_mtime_ns
    again = run(pipe, tmp_path / "whole")
    assert kept.stat().st_mtime_ns == time  # what is there is not drawn again
    fresh = run(pipe, tmp_path / "fresh")
    for one, two, three in zip(whole, again, fresh, strict=True):
        assert pixels(one.folder) == pixels(three.folder)
        assert one.as_dict(None) == two.as_dict(None) == three.as_dict(None)


def test_more_prompts_may_follow_and_other_images_are_not_mixed_in(pipe: Any, tmp_path: Path) -> None:
    first = run(pipe, tmp_path, 2)
    before = pixels(first[1].folder, 2)
    longer = run(pipe, tmp_path, 4)
    assert pixels(longer[1].folder, 2) == before
    assert missing_groups(longer[1].folder, 4, 2) == []
    with pytest.raises(ValueError, match="images of another drawing"):
        run(pipe, tmp_path, 2, guidance=5.0)
    drawing, prompts = Drawing(steps=2, batch=2, **SIZE), read_prompts("scenes", 2)
    with pytest.raises(ValueError, match="images of another method"):
        evaluate(pipe, {"dagger": Dense()}, prompts, drawing, QUICK, tmp_path)
    with pytest.raises(ValueError, match="images of other prompts"):
        evaluate(pipe, {"dense": Dense()}, read_prompts("scenes", 2, seed=1), drawing, QUICK, tmp_path)
    (longer[1].folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds images, but no settings\.json says of what"):
        run(pipe, tmp_path, 4)


def test_figures_are_of_the_images(pipe: Any, tmp_path: Path) -> None:
    dense, dagger, tome = run(pipe, tmp_path)
    assert dense.cost == 1.0 > dagger.cost > tome.cost
    assert "distance" not in dense.scores.per_image
    pairs = list(zip(image_files(dagger.folder, 5), image_files(dense.folder, 5), strict=True))
    for value, (ours, theirs) in zip(dagger.scores.per_image["distance"], pairs, strict=True):
        a, b = (np.asarray(Image.open(file), dtype=np.float64) for file in (ours, theirs))
        assert value == pytest.approx(10 * np.log10(255**2 / np.square(a - b).mean()), abs=1e-3)
    assert distances([pairs[0][1]], [pairs[0][1]]) == [pytest.approx(99.0, abs=0.1)]
    image_file(dagger.folder, 3).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*00003\.png"):
        run(pipe, tmp_path)
    Image.new("RGB", (64, 32)).save(image_file(dagger.folder, 3))
    with pytest.raises(ValueError, match=r"00003\.png has 64 x 32 pixels, .*00003\.png has 64 x 64"):
        run(pipe, tmp_path)


def test_fewer_steps_are_another_image_and_the_full_ones_are_what_is_compared_with(pipe: Any, tmp_path: Path) -> None:
    methods: dict[str, Candidate] = {"half": Dense(0.5), "dense": Dense()}
    drawing = Drawing(steps=2, batch=2, **SIZE)
    half, dense = evaluate(pipe, methods, read_prompts("scenes", 2), drawing, QUICK, tmp_path)
    assert half.cost == pytest.approx(0.5)
    assert dense.cost == 1
    assert half.scores.intervals()["distance"].mean < 40
    assert pixels(half.folder, 2) == pixels(run(pipe, tmp_path / "one", 2, steps=1)[0].folder, 2)


def test_what_cannot_be_applied_is_told_before_anything_is_drawn_and_leaves_the_folder_free(
    pipe: Any, tmp_path: Path
) -> None:
    methods: dict[str, Candidate] = {"dense": Dense(), "deep": Pruning(Variant(gradual=((5, 0.5),)))}
    prompts = read_prompts("scenes", 2)
    with pytest.raises(ValueError, match="deep cannot be applied: nothing to prune"):
        evaluate(pipe, methods, prompts, Drawing(steps=1), QUICK, tmp_path)
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="divisible by 8"):
        evaluate(pipe, {"dense": Dense()}, prompts, Drawing(steps=1, width=100, height=100), QUICK, tmp_path)
    (dense,) = evaluate(pipe, {"dense": Dense()}, prompts, Drawing(steps=1, **SIZE), QUICK, tmp_path)
    assert image_file(dense.folder, 1).exists()


def test_two_processes_give_the_images_and_figures_of_one(pipe: Any, tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(
        "import json, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\n"
        "from atedm.app.models import load_pipeline\n"
        "from atedm.lab.evaluation import run as module\n"
        "from atedm.lab.evaluation.sharing import shared_work\n"
        "from test_evaluation import run\n"
        "drawn, draw = [], module.draw_group\n"
        "def noted(*args):\n"
        "    drawn.append(str(args[4].name) + str(list(args[5])))\n"
        "    draw(*args)\n"
        "module.draw_group = noted\n"
        "out, rank = Path(sys.argv[3]), shared_work('cpu').process_index\n"
        "found = run(load_pipeline('tiny', device='cpu'), out)\n"
        "figures = [result.as_dict(None) for result in found]\n"
        "(out / f'drawn-{rank}').write_text(json.dumps([drawn, figures]))\n"
    )
    one = run(pipe, tmp_path / "one")
    # Only with --multi_gpu does accelerate start several processes on one machine, be there a GPU or not.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(here), str(here.parent), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for result in one:
        assert pixels(tmp_path / "two" / "images" / folder_name(result.name)) == pixels(result.folder)
    (first, figures), (second, nothing) = (
        json.loads((tmp_path / "two" / f"drawn-{rank}").read_text()) for rank in (0, 1)
    )
    assert nothing == []
    assert figures == json.loads(json.dumps([result.as_dict(None) for result in one]))
    assert first
    assert second
    assert not set(first) & set(second)
    groups = ([0, 1], [2, 3], [4])
    assert sorted(first + second) == sorted(f"{folder_name(one.name)}{group}" for one in one for group in groups)


def test_folders_of_different_methods_and_settings_differ() -> None:
    names = ["dense", "paper[a=1]", "paper[a-1]", "paper-a-1", "tome[ratio=0.5]"]
    assert len({folder_name(name) for name in names}) == len(names)
    assert all(folder_name(name).replace(".", "").replace("-", "").isalnum() for name in names)
    assert setting_name(Drawing(steps=10, dtype="bfloat16")) != setting_name(Drawing(steps=10, dtype="float32"))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_clip_score_and_fid_are_taken_by_the_shipped_clip_and_kept_until_an_image_changes(
    pipe: Any, tmp_path: Path
) -> None:
    metrics = Metrics(names=("clip", "fid"), clip_model=TINY_CLIP, fid_features=TINY_CLIP)
    prompts, drawing = read_prompts("scenes", 6), Drawing(steps=1, batch=3)

    def figures() -> dict[str, Any]:
        (dense,) = evaluate(pipe, {"dense": Dense()}, prompts, drawing, metrics, tmp_path)
        return dense.scores.intervals()

    first = figures()
    assert first.keys() == {"clip", "fid"}
    assert -1 <= first["clip"].mean <= 1
    assert figures() == first
    folder = tmp_path / "images"
    for index in range(6):  # real pictures are nearer to themselves than any drawing
        image_file(folder / "dense", index).write_bytes(image_file(folder / "reference", index).read_bytes())
    real = figures()
    assert real["fid"].mean == pytest.approx(0, abs=1e-3)
    assert real["fid"].mean < first["fid"].mean
    for stray in ("00000 (1).png", "._00000.png", "00000-copy.png"):  # is no image of the run
        (folder / "dense" / stray).write_bytes(image_file(folder / "dense", 1).read_bytes())
    (folder / "dense" / "features.json").unlink()
    assert figures()["fid"] == real["fid"]


def test_the_judge_reads_pictures_of_any_size(tmp_path: Path) -> None:
    scenes, images = rendered_scenes()
    prompts = [Prompt(scene.caption, scene) for scene in scenes[:12]]
    for size in ((256, 256), (512, 512), (320, 192)):
        folder = tmp_path / str(size[0])
        folder.mkdir()
        for index, image in enumerate(images[:12]):
            picture = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())
            picture.resize(size, Image.Resampling.BICUBIC).save(image_file(folder, index))
        found = score(folder, prompts, Metrics(("accuracy",)))
        assert found.intervals()["accuracy"].mean >= 0.75
        assert found.attributes()["object"].mean >= 0.9


def test_paired_differences_are_narrower_than_the_figures() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(30, 5, 200)
    one = Scores({"distance": list(base)})
    two = Scores({"distance": list(base + 1 + rng.normal(0, 0.1, 200))})
    difference = two.difference(one)["distance"]
    assert difference.low > 0.9
    assert difference.high < 1.1
    own = two.intervals()["distance"]
    assert own.high - own.low > 1


def test_lpips_is_the_packages_own_and_is_nought_for_equal_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips

    keep_random_alexnet(tmp_path / "torch", monkeypatch)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(file)
    found = lpips_distances(files[:2], [files[0], files[2]], device="cpu")
    assert found[0] == 0
    model = lpips.LPIPS(net="alex", verbose=False).eval()
    ours, theirs = (torch.from_numpy(pictures[i]).permute(2, 0, 1)[None] / 127.5 - 1 for i in (1, 2))
    assert found[1] == pytest.approx(float(model(ours, theirs).detach()), rel=1e-5)
    assert found[1] > 0


def test_weights_that_cannot_be_had_are_told_before_anything_is_drawn(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    prompts, drawing = read_prompts("scenes", 2), Drawing(steps=1, batch=2, **SIZE)
    nowhere = "local-dir:/nowhere"
    for metrics, said in (
        (
            Metrics(("lpips",)),
            r"LPIPS needs torchvision's weights of alex, which are not in .*empty.* no route to host",
        ),
        (Metrics(("clip",), clip_model=nowhere), f"cannot open the CLIP model {nowhere}"),
        (Metrics(("fid",), fid_features=nowhere), nowhere),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(pipe, {"dense": Dense()}, prompts, drawing, metrics, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without real pictures there is no FID, and nothing of it is needed.
    metrics = Metrics(("fid",), fid_features=nowhere)
    (result,) = evaluate(pipe, {"dense": Dense()}, [Prompt("a duck")], drawing, metrics, tmp_path / "out")
    assert result.scores.fid is None
    with pytest.raises(ValueError, match="FID needs at least two images"):
        evaluate(pipe, {"dense": Dense()}, prompts[:1], drawing, metrics, tmp_path / "out")


# --- experiments and reports ------------------------------------------------------------------------------------------


def outcomes_of(pipe: Any, experiment: Experiment, out: Path, **changes: Any) -> list[Outcome]:
    drawing = Drawing(**{"steps": 1, "batch": 2, **SIZE, **changes})
    return run_experiment(experiment, pipe, read_prompts("scenes", 2), drawing, QUICK, out)


def test_what_cannot_be_had_is_left_out_and_said(pipe: Any, tmp_path: Path) -> None:
    experiment = Experiment("t", "s", {"dense": "dense", "too cheap": "paper[cost=0.2]"})
    (outcome,) = outcomes_of(pipe, experiment, tmp_path)
    assert [result.name for result in outcome.results] == ["dense"]
    assert "- too cheap: " in markdown_of([outcome])
    assert outcome.as_dict()["left_out"].keys() == {"too cheap"}
    with pytest.raises(ValueError, match="cannot cost"):
        outcomes_of(pipe, Experiment("t", "s", {"too cheap": "paper[cost=0.2]"}), tmp_path)


def test_the_sheet_shows_every_setting_and_marks_what_is_wrong(pipe: Any, tmp_path: Path) -> None:
    experiment = Experiment("t", "s", {"dense": "dense", "own": "matched"}, guidance=(1.0, 3.0))
    outcomes = outcomes_of(pipe, experiment, tmp_path)
    assert [outcome.setting for outcome in outcomes] == [{"guidance": 1.0}, {"guidance": 3.0}]
    assert markdown_of(outcomes).startswith("| guidance | method | cost | distance to dense, dB | captions right")
    sheet = sheet_of(outcomes, read_prompts("scenes", 2), side=160)
    shown = [(outcome, index) for outcome in outcomes for index in range(2)]
    for row, (outcome, index) in enumerate(shown):
        for column, result in enumerate(outcome.results):
            with Image.open(image_file(result.folder, index)) as image:
                picture = image.resize((160, 160), Image.Resampling.BICUBIC)
            x, y = 10 + 170 * column, 10 + (26 + 18 + 170) * row + 26 + 18
            assert (
                sheet.crop((x + 20, y + 20, x + 140, y + 140)).tobytes() == picture.crop((20, 20, 140, 140)).tobytes()
            )
            is_right = result.scores.accuracy["all"][0][index]
            frame = np.abs(np.array(sheet.getpixel((x + 1, y + 80))) - (220, 30, 30)).max() < 5
            assert frame == (not is_right)


def test_the_report_shows_every_method_and_needs_nothing_else(pipe: Any, tmp_path: Path) -> None:
    experiment = Experiment("A & B", "supplement", {"dense": "dense", "own": "matched", "tome": "tome"})
    (outcome,) = outcomes_of(pipe, experiment, tmp_path)
    prompts = [Prompt("<script>")] * 2
    text = write_report(experiment, [outcome], prompts, QUICK, tmp_path, "name")
    assert text == (tmp_path / "name.md").read_text()
    assert text.startswith("## A & B (supplement)")
    quality, attributes = tables([outcome])
    assert quality[0] == ["method", "cost", "distance to dense, dB", "captions right in everything, %"]
    assert [row[0] for row in quality[1]] == ["dense", "own", "tome"]
    assert attributes[0][:3] == ["right, %", "count", "object"]
    page = (tmp_path / "name.html").read_text()
    assert "A &amp; B" in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    stored = json.loads((tmp_path / "name.json").read_text())
    assert stored["images"] == 2
    own = stored["outcomes"][0]["results"][1]
    assert own["method"]["method"] == "matched"
    assert len(own["minus_dense"]["accuracy"]) == 3
    for name in ("name.png", "name-sheet.png"):
        assert (tmp_path / name).stat().st_size > 200
    bare = Outcome(outcome.drawing, tuple(_without_scores(result) for result in outcome.results))
    write_report(experiment, [bare], prompts, Metrics(()), tmp_path, "name")
    assert not (tmp_path / "name.png").exists()  # nothing to chart, and no chart of before


def _without_scores(result: Any) -> Any:
    return type(result)(result.name, result.candidate, result.cost, Scores(), result.folder)
