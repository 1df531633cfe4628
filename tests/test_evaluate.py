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

import atedm
from atedm.cli.reproduce import _kind
from atedm.config import PRESETS, PruningConfig
from atedm.costs.fit import mean_share
from atedm.costs.tome import ToMe
from atedm.evaluation.clip_score import TINY_CLIP
from atedm.evaluation.evaluate import evaluate, image_of, slug
from atedm.evaluation.experiments import EXPERIMENTS, GUIDANCE_SCALES, Experiment, only_as_asked, results_name
from atedm.evaluation.images import Drawing, claim_folder, groups, image_file, missing_groups
from atedm.evaluation.methods import Caching, Dense, Merging, Pruning, Stacked, counted_run
from atedm.evaluation.methods_by_name import method_by_name, parse_methods
from atedm.evaluation.perceptual import lpips_distances
from atedm.evaluation.prompts import Prompt, read_prompts, write_references
from atedm.evaluation.report import markdown, write_html
from atedm.evaluation.reproduce import folder_name, markdown_of, reproduce, sheet_of
from atedm.evaluation.scores import Metrics, Scores, distances, score
from atedm.evaluation.statistics import Interval
from atedm.pictures.quality_chart import cost_chart, rows_chart
from atedm.pipelines import TINY, load_pipeline
from models import draw, sdxl_pipeline, snapshot

QUICK = Metrics(names=("distance", "accuracy"))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(TINY, device="cpu")


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        Dense(),
        Pruning(PRESETS["paper"]),
        Merging(ToMe(0.5)),
        Merging(ToMe(0.5, prune_less_share=0.3)),
        Caching(2),
        Stacked((Pruning(PRESETS["dagger"]), Caching(3))),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_method_changes_the_image_and_leaves_no_trace(method: Any) -> None:
    pipe = sdxl_pipeline()
    dense, before = draw(pipe), snapshot(pipe.unet)
    with method.applied(pipe):
        changed = draw(pipe)
    assert torch.equal(changed, dense) == isinstance(method, Dense)
    assert snapshot(pipe.unet) == before
    assert torch.equal(draw(pipe), dense)
    with pytest.raises(RuntimeError, match="in the middle"), method.applied(pipe):
        raise RuntimeError("in the middle")
    assert snapshot(pipe.unet) == before


def test_a_run_counted_on_the_pipeline_costs_what_the_report_says(pipe: Any) -> None:
    options: dict[str, Any] = {"steps": 4, "guidance": 3.0, "width": None, "height": None}
    report = atedm.cost(pipe, "paper", steps=4)
    assert counted_run(pipe, Dense(), "a red circle", **options) == 4 * report.figures().dense
    assert counted_run(pipe, Pruning(PRESETS["paper"]), "a red circle", **options) == 4 * report.figures().mean
    for tome in (ToMe(0.5), ToMe(0.3, "self-attention"), ToMe(0.5, prune_less_share=0.3)):
        assert counted_run(pipe, Merging(tome), "a red circle", **options) == 4 * report.with_tome(tome).mean
    assert counted_run(pipe, Caching(2), "x", **options) < 0.6 * counted_run(pipe, Dense(), "x", **options)


def test_methods_are_read_as_they_are_written() -> None:
    specs = "dense, paper[recovery=direct-copy,pruning_rate=0.5], tome[ratio=0.4]+deepcache[interval=3]"
    assert parse_methods(specs) == [
        "dense", "paper[recovery=direct-copy,pruning_rate=0.5]", "tome[ratio=0.4]+deepcache[interval=3]",
    ]  # fmt: skip
    dense, paper, both = map(method_by_name, parse_methods(specs))
    assert dense == Dense()
    assert paper == Pruning(PRESETS["paper"].replace(recovery="direct-copy", pruning_rate=0.5))
    assert both == Stacked((Merging(ToMe(0.4)), Caching(3)))


@pytest.mark.parametrize("spec", ["matched+tome", "tome[ratio=0.4]+paper", "dagger+deepcache+tome"])
def test_tome_does_not_go_with_pruning(spec: str) -> None:
    with pytest.raises(ValueError, match="ToMe and pruning do not go together"):
        method_by_name(spec)


def test_a_cost_may_be_given_as_a_share_of_dense() -> None:
    assert method_by_name("dense[cost=0.7]") == Dense(0.7)
    assert Dense(0.7).steps_of(20) == 14
    for name in ("tome", "paper", "matched"):
        method = method_by_name(f"{name}[cost=0.85]", TINY, steps=20)
        assert isinstance(method, Pruning | Merging)
        what = method.config if isinstance(method, Pruning) else method.tome
        assert mean_share(TINY, what, steps=20) == pytest.approx(0.85, abs=0.01)


def test_a_cost_is_solved_for_the_steps_that_are_left() -> None:
    both = method_by_name("dense[cost=0.3]+paper[cost=0.85]", TINY, steps=4)
    assert isinstance(both, Stacked)
    assert both.methods[1] == method_by_name("paper[cost=0.85]", TINY, steps=1)
    assert both.methods[1] != method_by_name("paper[cost=0.85]", TINY, steps=4)
    assert method_by_name("dense[cost=paper]", TINY, steps=20) == Dense(mean_share(TINY, PRESETS["paper"], steps=20))


def test_fewer_steps_are_another_image_and_the_full_ones_are_what_is_compared_with(pipe: Any, tmp_path: Path) -> None:
    methods = {"half": Dense(0.5), "dense": Dense()}
    half, dense = evaluate(pipe, methods, read_prompts("scenes", 2), Drawing(steps=4, batch=2), QUICK, tmp_path)
    assert half.cost == pytest.approx(0.5)
    assert dense.cost == 1
    assert half.scores.intervals()["psnr"].mean < 40
    assert "psnr" not in dense.scores.intervals()
    two = run(pipe, tmp_path / "two", 2)[0]
    assert pixels(half.folder, 2) == pixels(two.folder, 2)


def test_the_judge_reads_pictures_of_any_size(tmp_path: Path) -> None:
    prompts = read_prompts("scenes", 4)
    same, larger, wide = (tmp_path / name for name in ("same", "larger", "wide"))
    list(write_references(prompts, same, (128, 128), 0))
    for folder, size in ((larger, (512, 512)), (wide, (320, 192))):
        folder.mkdir()
        for index in range(4):
            with Image.open(image_file(same, index)) as picture:
                picture.resize(size, Image.Resampling.BICUBIC).save(image_file(folder, index))
    for folder in (same, larger, wide):
        assert score(folder, prompts, Metrics(("accuracy",))).intervals()["accuracy"].mean == 1


def test_what_cannot_be_had_is_left_out_and_said(pipe: Any, tmp_path: Path) -> None:
    experiment = Experiment("t", "s", {"dense": "dense", "too cheap": "paper[cost=0.2]"})
    (outcome,) = reproduce(experiment, pipe, read_prompts("scenes", 2), Drawing(steps=1, batch=2), QUICK, tmp_path)
    assert [result.name for result in outcome.results] == ["dense"]
    assert "too cheap: " in markdown_of(experiment, [outcome])
    assert outcome.as_dict()["left_out"].keys() == {"too cheap"}
    hopeless = Experiment("t", "s", {"too cheap": "paper[cost=0.2]"})
    with pytest.raises(ValueError, match="cannot cost"):
        reproduce(hopeless, pipe, read_prompts("scenes", 2), Drawing(steps=1, batch=2), QUICK, tmp_path)


def test_the_sheet_shows_every_setting(pipe: Any, tmp_path: Path) -> None:
    experiment = Experiment("t", "s", {"dense": "dense", "matched": "matched"}, guidance=(1.0, 3.0))
    prompts = read_prompts("scenes", 2)
    outcomes = reproduce(experiment, pipe, prompts, Drawing(steps=1, batch=2), QUICK, tmp_path)
    sheet = sheet_of(experiment, outcomes, prompts)
    shown = [(outcome, index) for outcome in outcomes for index in range(2)]
    for row, (outcome, index) in enumerate(shown):
        for column, result in enumerate(outcome.results):
            with Image.open(image_of(result, index)) as image:
                picture = image.resize((160, 160), Image.Resampling.BICUBIC)
            x, y = 10 + 170 * column, 10 + (26 + 18 + 170) * row + 26 + 18
            assert sheet.crop((x, y, x + 160, y + 160)).tobytes() == picture.tobytes(), (row, column)


def test_equal_cost_is_solved_for(pipe: Any) -> None:
    paper = atedm.cost(TINY, "paper", steps=20).figures().mean
    tome = method_by_name("tome[cost=paper]", TINY, steps=20)
    assert isinstance(tome, Merging)
    assert atedm.cost(TINY, tome.tome, steps=20).figures().mean == pytest.approx(paper, rel=0.01)
    spread = method_by_name("tome[prune_less_share=0.3,cost=paper]", TINY, steps=20)
    assert isinstance(spread, Merging)
    assert spread.tome.ratio > tome.tome.ratio
    assert atedm.cost(TINY, spread.tome, steps=20).figures().mean == pytest.approx(paper, rel=0.01)
    constant = method_by_name("paper[schedule=constant,cost=paper[pruning_rate=0.5]]", TINY, steps=20)
    assert isinstance(constant, Pruning)
    assert constant.config.pruning_rate < 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("papre", "did you mean 'paper'"),
        ("paper[rankin=x]", "did you mean 'ranking'"),
        ("paper[ranking=x]", "unknown ranking"),
        ("tome[ratio=0.9]", "ratio must be"),
        ("tome[rate=0.5]", "did you mean 'ratio'"),
        ("dense[steps=1]", "did you mean 'steps_share'"),
        ("dense[steps_share=1.5]", "steps_share must be"),
        ("deepcache[cost=0.5]", "a cost is solved for"),
        ("paper[cost=0.2]", "cannot cost"),
        ("paper[ranking]", "write field=value"),
        ("paper[", "brackets do not match"),
        ("deepcache[interval=0]", "interval must be"),
        ("tome[cost=deepcache]", "cost must be a share of dense"),
        ("tome[cost=paper[pruning_rate=0.0,schedule=constant]]+papre", "unknown method"),
    ],
)
def test_a_method_that_cannot_be_is_told_so(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_by_name(spec)


def test_a_method_is_named_once() -> None:
    with pytest.raises(ValueError, match="'paper' is named twice"):
        parse_methods("paper,dense,paper")
    with pytest.raises(ValueError, match="at least one method"):
        parse_methods(" , ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_method_of_every_experiment_can_be_read(name: str) -> None:
    known: dict[str, str] = {}
    for spec in EXPERIMENTS[name].methods.values():
        if "cost=" not in spec:  # solving takes a while, and is tested above
            method = json.dumps(method_by_name(spec, TINY, steps=20).as_dict())
            assert known.setdefault(method, spec) == spec  # one method is written one way, so its images are shared
    assert known


def test_a_run_from_before_a_choice_was_added_goes_on(tmp_path: Path) -> None:
    drawing, prompts = Drawing(steps=1), [Prompt("a")]
    method = Stacked((Pruning(PRESETS["dagger"]), Caching(3)))
    claim_folder(tmp_path, method, drawing, prompts, 1)
    image_file(tmp_path, 0).touch()
    file = tmp_path / "settings.json"
    stored = json.loads(file.read_text())
    del stored["method"]["methods"][0]["cover_share"]
    del stored["method"]["methods"][1]["branch"]
    file.write_text(json.dumps(stored))
    claim_folder(tmp_path, method, drawing, prompts, 1)
    with pytest.raises(ValueError, match="another method"):
        claim_folder(tmp_path, Stacked((Pruning(PRESETS["dagger"]), Caching(3, 1))), drawing, prompts, 1)


def test_folders_of_different_methods_differ() -> None:
    names = ["dense", "paper[a=1]", "paper[a-1]", "paper-a-1", "tome[ratio=0.5]"]
    assert len({slug(name) for name in names}) == len(names)
    assert all(slug(name).replace(".", "").replace("-", "").isalnum() for name in names)


# --- prompts ----------------------------------------------------------------------------------------------------------


def coco_folder(folder: Path) -> Path:
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 60, "width": 90} for n in (7, 3, 5)]
    captions = [
        {"id": 10, "image_id": 3, "caption": "A second caption."},
        {"id": 4, "image_id": 3, "caption": " A red\n bus. "},
        {"id": 11, "image_id": 7, "caption": "A dog."},
        {"id": 12, "image_id": 5, "caption": "Its picture is missing."},
    ]
    content = {"images": images, "annotations": captions, "info": {}, "licenses": []}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    stripes = np.zeros((60, 90, 3), np.uint8)
    stripes[:, 15:75] = 255  # the middle square is white
    for n in (3, 7):
        Image.fromarray(stripes).save(folder / "val2017" / f"{n:012d}.jpg")
    return folder


def test_coco_gives_one_caption_a_picture_cropped_to_the_middle(tmp_path: Path) -> None:
    prompts = read_prompts(str(coco_folder(tmp_path)))
    assert [prompt.text for prompt in prompts] == ["A red bus.", "A dog."]
    assert list(write_references(prompts, tmp_path / "reference", (32, 32))) == [0, 1]
    with Image.open(tmp_path / "reference" / "00000.png") as picture:
        assert picture.size == (32, 32)
        assert np.asarray(picture).min() > 200
    (tmp_path / "val2017" / "000000000003.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the picture .*000000000003\.jpg"):
        list(write_references(prompts, tmp_path / "again", (32, 32)))


def test_real_pictures_are_those_of_the_prompts_size_and_seed_at_hand(tmp_path: Path) -> None:
    def written(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[bytes]:
        list(write_references(read_prompts("scenes", count, seed), folder, size, seed))
        return [image_file(folder, index).read_bytes() for index in range(count)]

    def fresh(*args: Any) -> list[bytes]:
        return written(tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}", *args)

    used = tmp_path / "used"
    assert written(used, 3) == fresh(3)
    first = image_file(used, 0).stat().st_mtime_ns
    assert written(used, 5) == fresh(5)
    assert written(used, 2) == fresh(2)
    assert image_file(used, 0).stat().st_mtime_ns == first  # they stay where they are the same
    assert written(used, 4, 1) == fresh(4, 1)
    assert written(used, 4) == fresh(4)
    assert written(used, 4, 0, (32, 32)) == fresh(4, 0, (32, 32))
    stopped = write_references(read_prompts("scenes", 4), used, (64, 64))
    next(stopped)  # and no more
    assert written(used, 4, 0, (32, 32)) == fresh(4, 0, (32, 32))
    (used / "settings.json").unlink()
    image_file(used, 2).write_bytes(b"of who knows what")
    assert written(used, 4) == fresh(4)


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"))] == ["a cat", "a dog"]
    assert len(read_prompts(str(tmp_path / "a.txt"), at_most=50)) == 2
    assert len(read_prompts(str(tmp_path / "a.txt"), at_most=1)) == 1
    (tmp_path / "b.txt").write_bytes("a cat\u2028on a mat\x85\r\na dog\r\n".encode())
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "b.txt"))] == ["a cat\u2028on a mat", "a dog"]
    (tmp_path / "a.csv").write_text('number,Prompt\n1,"a cat,\n asleep"\n2,\n3,a dog\n')
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.csv"))] == ["a cat, asleep", "a dog"]
    assert len(read_prompts(str(tmp_path / "a.csv"), 1)) == 1
    scenes = read_prompts("scenes", 5)
    assert scenes == read_prompts("scenes", 9)[:5]
    assert all(prompt.scene is not None and prompt.scene.caption == prompt.text for prompt in scenes)


def test_what_holds_no_prompts_is_told_so(tmp_path: Path) -> None:
    def refused(source: Path | str, message: str, count: int | None = None) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_prompts(str(source), count)

    refused(tmp_path / "gone.txt", "no prompts at")
    refused(tmp_path, "is no folder of MS-COCO")
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(tmp_path / "empty.txt", "holds no prompts")
    (tmp_path / "a.csv").write_text("text\nx\n")
    refused(tmp_path / "a.csv", "no column 'prompt' or 'caption', but text")
    (tmp_path / "a.csv").write_text("prompt\n" + 140_000 * "x")
    refused(tmp_path / "a.csv", "is no CSV: field larger than")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    refused(tmp_path / "bytes.txt", "not text in UTF-8")
    (tmp_path / "one.txt").write_text("x")
    refused(tmp_path / "one.txt", "holds 1 prompts, fewer than the 2", 2)
    refused("scenes", "captions must be at least 1", 0)
    folder = coco_folder(tmp_path)
    captions = folder / "annotations" / "captions_val2017.json"
    whole = captions.read_text()
    captions.write_text(whole.replace("000000000003.jpg", "../../secret.jpg"))
    refused(folder, r"names a picture outside of its folder: \.\./\.\./secret\.jpg")
    captions.write_text(whole.replace('"file_name"', '"name"'))
    refused(folder, "captions_val2017.json is no caption file of MS-COCO")
    captions.write_text(whole)
    for picture in (folder / "val2017").iterdir():
        picture.unlink()
    refused(folder, "captions of 3 pictures, but none of them")
    (folder / "annotations" / "captions_val2017.json").write_text("[]")
    refused(folder, "no caption file of MS-COCO")


# --- a run ------------------------------------------------------------------------------------------------------------


def run(pipe: Any, out: Path, count: int = 5, **changes: Any) -> list[Any]:
    methods = {"dense": Dense(), "dagger": Pruning(PRESETS["dagger"]), "tome": Merging(ToMe(0.5))}
    return evaluate(pipe, methods, read_prompts("scenes", count), Drawing(steps=2, batch=2, **changes), QUICK, out)


def pixels(folder: Path, count: int = 5) -> list[bytes]:
    return [image_file(folder, index).read_bytes() for index in range(count)]


def test_a_run_that_was_stopped_goes_on_to_the_same_images_and_figures(pipe: Any, tmp_path: Path) -> None:
    whole = run(pipe, tmp_path / "whole")
    expected = json.loads((tmp_path / "whole" / "results.json").read_text())
    for name in ("dense", "dagger", "tome"):
        # Of the groups 0-1, 2-3 and 4 one was cut through, one was never begun.
        for index in (1, 4):
            image_file(tmp_path / "whole" / "images" / name, index).unlink()
    kept = image_file(tmp_path / "whole" / "images" / "tome", 2)
    time = kept.stat().st_mtime_ns
    again = run(pipe, tmp_path / "whole")
    assert kept.stat().st_mtime_ns == time  # what is there is not drawn again
    assert json.loads((tmp_path / "whole" / "results.json").read_text()) == expected
    fresh = run(pipe, tmp_path / "fresh")
    for one, two, three in zip(whole, again, fresh, strict=True):
        assert pixels(one.folder) == pixels(three.folder)
        assert one.scores == two.scores == three.scores


def test_more_prompts_may_follow_and_other_images_are_not_mixed_in(pipe: Any, tmp_path: Path) -> None:
    first = run(pipe, tmp_path, 2)
    before = pixels(first[1].folder, 2)
    longer = run(pipe, tmp_path, 4)
    assert pixels(longer[1].folder, 2) == before
    assert missing_groups(longer[1].folder, 4, 2) == []
    with pytest.raises(ValueError, match="images of another drawing"):
        run(pipe, tmp_path, 2, guidance=5.0)
    with pytest.raises(ValueError, match="images of another method"):
        evaluate(pipe, {"dagger": Dense()}, read_prompts("scenes", 2), Drawing(steps=2, batch=2), QUICK, tmp_path)
    with pytest.raises(ValueError, match="images of other prompts"):
        evaluate(
            pipe, {"dense": Dense()}, read_prompts("scenes", 2, seed=1), Drawing(steps=2, batch=2), QUICK, tmp_path
        )
    (longer[1].folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds images, but no settings\.json says of what"):
        run(pipe, tmp_path, 4)


def test_what_an_experiment_varies_can_be_one_setting_that_was_asked_for() -> None:
    curve, few = EXPERIMENTS["curve"], EXPERIMENTS["few-steps"]
    assert only_as_asked(curve, steps=10, guidance=7.0).guidance == (7.0,)
    assert only_as_asked(curve, steps=10).guidance == GUIDANCE_SCALES
    assert only_as_asked(few, steps=3, guidance=1.0).steps == (3,)
    assert only_as_asked(few).steps == (1, 2, 4, 8)
    assert only_as_asked(EXPERIMENTS["place"], 3, 2.0) == EXPERIMENTS["place"]


def test_results_of_one_setting_do_not_take_the_place_of_those_of_another() -> None:
    assert results_name("curve") == "curve"
    assert results_name("curve", steps=10, guidance=2.5) == "curve-10-steps-guidance-2.5"
    assert results_name("few-steps", steps=1, size=(192, 256)) == "few-steps-1-step-192x256"
    assert results_name("why", steps=10, dtype="bfloat16") == "why-10-steps-bfloat16"
    assert folder_name(Drawing(steps=10, dtype="bfloat16")) != folder_name(Drawing(steps=10, dtype="float32"))


def test_figures_are_of_the_images(pipe: Any, tmp_path: Path) -> None:
    dense, dagger, tome = run(pipe, tmp_path)
    assert dense.cost == 1.0 > dagger.cost > tome.cost
    assert dense.scores.psnr == []
    pairs = [(image_file(dagger.folder, i), image_file(dense.folder, i)) for i in range(5)]
    for value, (ours, theirs) in zip(dagger.scores.psnr, pairs, strict=True):
        a, b = (np.asarray(Image.open(file), dtype=np.float64) for file in (ours, theirs))
        assert value == pytest.approx(10 * np.log10(255**2 / np.square(a - b).mean()), abs=1e-3)
    assert distances([pairs[0][1]], [pairs[0][1]]) == [pytest.approx(99.0, abs=0.1)]
    image_file(dagger.folder, 3).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*00003\.png"):
        run(pipe, tmp_path)
    Image.new("RGB", (64, 32)).save(image_file(dagger.folder, 3))
    with pytest.raises(ValueError, match=r"00003\.png has 64 x 32 pixels, .*00003\.png has 128 x 128"):
        run(pipe, tmp_path)


def test_what_cannot_be_applied_is_told_before_anything_is_drawn_and_leaves_the_folder_free(
    pipe: Any, tmp_path: Path
) -> None:
    methods = {"dense": Dense(), "deep": Pruning(PruningConfig(gradual=((5, 0.5),)))}
    prompts = read_prompts("scenes", 2)
    with pytest.raises(ValueError, match="deep cannot be applied: nothing to prune"):
        evaluate(pipe, methods, prompts, Drawing(steps=1), QUICK, tmp_path)
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="divisible by 8"):
        evaluate(pipe, {"dense": Dense()}, prompts, Drawing(steps=1, width=100, height=100), QUICK, tmp_path)
    (dense,) = evaluate(pipe, {"dense": Dense()}, prompts, Drawing(steps=1), QUICK, tmp_path)
    assert image_file(dense.folder, 1).exists()


def test_clip_score_and_fid_are_taken_by_the_shipped_clip_and_kept_until_an_image_changes(
    pipe: Any, tmp_path: Path
) -> None:
    metrics = Metrics(names=("clip", "fid"), clip_model=TINY_CLIP, fid_features=TINY_CLIP)
    prompts, drawing = read_prompts("scenes", 6), Drawing(steps=3, batch=3)

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
    assert real["clip"].mean > first["clip"].mean
    for stray in ("00000 (1).png", "._00000.png", "00000-copy.png"):  # is no image of the run
        (folder / "dense" / stray).write_bytes(image_file(folder / "dense", 1).read_bytes())
    (folder / "dense" / "features.json").unlink()
    assert figures()["fid"] == real["fid"]


def test_paired_differences_are_narrower_than_the_figures() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(30, 5, 200)
    one, two = Scores(psnr=list(base)), Scores(psnr=list(base + 1 + rng.normal(0, 0.1, 200)))
    difference = two.difference(one)["psnr"]
    assert difference.low > 0.9
    assert difference.high < 1.1
    own = two.intervals()["psnr"]
    assert own.high - own.low > 1


def test_the_report_shows_every_method_and_needs_nothing_else(pipe: Any, tmp_path: Path) -> None:
    results = run(pipe, tmp_path)
    lines = markdown(results).splitlines()
    assert lines[0].startswith("| method | cost | distance to dense, dB | captions right")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| dagger", "| tome"]
    write_html(results, [Prompt("<script>")] * 5, "A & B", "note", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "A &amp; B" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_two_processes_give_the_images_and_figures_of_one(pipe: Any, tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    script.write_text(
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from atedm.evaluation import evaluate\n"
        "from atedm.evaluation.sharing import shared_work\n"
        "from atedm.pipelines import load_pipeline\n"
        "from test_evaluate import run\n"
        "drawn = []\n"
        "draw = evaluate.draw_groups\n"
        "def noted(*args):\n"
        "    drawn.extend(str(args[4].name) + str(list(group)) for group in args[5])\n"
        "    draw(*args)\n"
        "evaluate.draw_groups = noted\n"
        "run(load_pipeline('tiny', device='cpu'), Path(sys.argv[2]))\n"
        "Path(sys.argv[2], f'drawn-{shared_work().process_index}').write_text('\\n'.join(drawn))\n"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(pipe, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    # Only with --multi_gpu does accelerate start several processes on one machine, be there a GPU or not.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(Path(__file__).parent), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for result in one:
        assert pixels(tmp_path / "two" / "images" / slug(result.name)) == pixels(result.folder)
    single, shared = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert single == shared
    first, second = ((tmp_path / "two" / f"drawn-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first
    assert second
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(
        f"{slug(result.name)}{list(group)}" for result in one for group in groups(5, 2)
    )


def test_lpips_is_the_packages_own_and_is_nought_for_equal_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lpips
    import torchvision

    # Torchvision's weights cannot be had everywhere: random ones under their name are opened by the same code.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    network = torchvision.models.alexnet()
    torch.save(network.state_dict(), tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
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
    prompts = read_prompts("scenes", 2)
    drawing = Drawing(steps=1, batch=2)
    for metrics, said in (
        (
            Metrics(("lpips",)),
            r"LPIPS needs torchvision's weights of alex, which are not in .*empty.* no route to host",
        ),
        (Metrics(("clip",), clip_model="local-dir:/nowhere"), "cannot open the CLIP model local-dir:/nowhere"),
        (Metrics(("fid",), fid_features="local-dir:/nowhere"), "local-dir:/nowhere"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(pipe, {"dense": Dense()}, prompts, drawing, metrics, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without real pictures there is no FID, and nothing of it is needed.
    metrics = Metrics(("fid",), fid_features="local-dir:/nowhere")
    (result,) = evaluate(pipe, {"dense": Dense()}, [Prompt("a red circle")], drawing, metrics, tmp_path / "out")
    assert result.scores.fid is None


def test_a_chart_joins_methods_of_one_kind_where_they_differ_in_cost() -> None:
    specs = [
        "paper", "paper[pruning_rate=0.5]", "dagger", "matched", "tome", "deepcache", "matched+deepcache", "dense",
        "dense[cost=0.5]", "matched-deep", "matched-deep[pruning_rate=0.9]", "matched[pruning_rate=0.9]",
    ]  # fmt: skip
    kinds = {spec: _kind(method_by_name(spec)) for spec in specs}
    assert list(kinds.values()) == [
        "AT-EDM", "AT-EDM", "AT-EDM†", "Matched pruning", "ToMe", "DeepCache", "Matched pruning + DeepCache",
        "dense", "dense, fewer steps", "Matched pruning, deep", "Matched pruning, deep", "Matched pruning",
    ]  # fmt: skip
    figures = {spec: (0.1 * index, Interval(index, index - 1, index + 1)) for index, spec in enumerate(specs)}
    alone, joined = cost_chart(figures, "it"), cost_chart(figures, "it", kinds=kinds)
    assert alone.size == joined.size
    assert alone.tobytes() != joined.tobytes()


def test_a_chart_of_rows_grows_with_them_and_shows_what_each_has() -> None:
    one = {"dense": {"captions": (Interval(0.9, 0.8, 1.0), 100.0)}}
    two = one | {"paper": {"captions": (Interval(0.1, 0.0, 0.2), 100.0), "distance": (Interval(20, 19, 21), 1.0)}}
    assert rows_chart(two).size > rows_chart(one).size
    other = two | {"paper": two["paper"] | {"distance": (Interval(30, 29, 31), 1.0)}}
    assert rows_chart(two).tobytes() != rows_chart(other).tobytes()
