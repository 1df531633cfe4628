"""Faults: whatever is killed, cut short, starved or fed nonsense goes on correctly or ends in one clear line.

`ATEDM_FAULTS=250 pytest -n 0 -s tests/test_faults.py` injects as many faults, and says of what kind; CI injects fewer.
"""

import copy
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import atedm
from atedm.config import PRESETS, PruningConfig
from atedm.evaluation.evaluate import evaluate
from atedm.evaluation.images import Drawing
from atedm.evaluation.methods_by_name import method_by_name
from atedm.evaluation.prompts import read_prompts
from atedm.evaluation.scores import Metrics
from atedm.generate import generate
from atedm.map_fallback import with_memory_there_is
from atedm.map_modes import scores_in_blocks
from atedm.pipelines import load_pipeline, tiny_folder
from atedm.ranking import rank_by_attention
from atedm.request import Request
from faults import broken, command, ended, in_child, killed_at_write, largest_file, memory_left, whole_files
from models import LATE, draw, inputs, run, sdxl_pipeline, sdxl_unet, small_unet, snapshot
from test_evaluate import coco_folder

FAULTS = int(os.environ.get("ATEDM_FAULTS", "25"))
"""How many are injected, about."""
INJECTED: Counter[str] = Counter()
MOMENTS = ("before", "half", "after")


def faults(kind: str, share: float, *, counted: bool = True) -> Iterator[random.Random]:
    """Yield a source of chance for each fault of a kind, which are a share of all."""
    for number in range(max(2, round(share * FAULTS))):
        INJECTED[kind] += counted
        yield random.Random(f"{kind} {number}")


@pytest.fixture(scope="module", autouse=True)
def said() -> Iterator[None]:
    yield
    print("\n" + ", ".join(f"{what}: {count}" for what, count in sorted(INJECTED.items())), end="")
    print(f"; {INJECTED.total()} faults")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("tiny", device="cpu")


# --- Killed -----------------------------------------------------------------------------------------------------------

PROMPTS = read_prompts("scenes", 4, 0)
METHODS = {name: method_by_name(name) for name in ("dense", "matched")}


def evaluated(pipe: Any, out: Path) -> dict[str, Any]:
    """A short run of `atedm evaluate`; its results as they are on the disk."""
    drawing = Drawing(steps=1, guidance=1.0, batch=2)
    evaluate(pipe, METHODS, PROMPTS, drawing, Metrics(names=("distance", "accuracy")), out)
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def generated(pipe: Any, out: Path) -> None:
    prompts = tuple(prompt.text for prompt in PROMPTS[:2])
    generate(pipe, Request(prompts, PRESETS["dagger"], steps=1, guidance=1.0), out, compare=True, maps=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.png")}


def killed(kind: str, work: Callable[[], Any], writes: int, seconds: float, chance: random.Random) -> None:
    """Run ``work`` in a child that is killed at some moment: at one of its writes, or anywhere."""
    if chance.random() < 0.5:
        before = killed_at_write(chance.randrange(writes), chance.choice(MOMENTS))
        status = ended(in_child(lambda: (before(), work())))  # type: ignore[func-returns-value]
    else:
        status = ended(in_child(work), kill_after=chance.uniform(0, seconds))
    assert status in (0, -9)
    INJECTED[kind] += status == -9  # or it was quicker than the kill


def test_an_evaluation_that_is_killed_goes_on_to_the_same(tiny: Any, tmp_path: Path) -> None:
    undisturbed = evaluated(tiny, tmp_path / "undisturbed")
    images = content(tmp_path / "undisturbed")
    for number, chance in enumerate(faults(kind := "evaluate killed", 0.2, counted=False)):
        out = tmp_path / str(number)
        for _ in range(chance.choice([1, 1, 2])):  # now and then killed again when it goes on
            killed(kind, lambda out=out: evaluated(tiny, out), 9, 3.0, chance)  # type: ignore[misc]
            for file in whole_files(out) if out.exists() else ():
                assert images.get(str(file.relative_to(out)), file.read_bytes()) == file.read_bytes()
        assert evaluated(tiny, out) == undisturbed
        assert content(out) == images
        assert not list(out.rglob(".*.partial"))
        shutil.rmtree(out)


def test_a_run_that_is_killed_leaves_whole_files_and_can_be_run_again(tiny: Any, tmp_path: Path) -> None:
    generated(tiny, tmp_path / "undisturbed")
    images = content(tmp_path / "undisturbed")
    for number, chance in enumerate(faults(kind := "generate killed", 0.14, counted=False)):
        out = tmp_path / str(number)
        killed(kind, lambda out=out: generated(tiny, out), 8, 2.0, chance)  # type: ignore[misc]
        for file in whole_files(out) if out.exists() else ():
            assert images.get(str(file.relative_to(out)), file.read_bytes()) == file.read_bytes()
        generated(tiny, out)
        assert content(out) == images


def sitting(out: Path) -> None:
    """A few seconds of training."""
    from atedm.tiny.train import train

    small = {"canvas": 64, "batch": 2, "scenes": 32, "start_from": tiny_folder(), "eager": True}
    train(out, minutes=0.005, lr=1e-4, floor=0.02, autoencoder_minutes=0.0, reversed_share=1.0, seed=0, **small)


def test_half_a_folder_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    def killed_at_the_second_copy() -> None:
        copied = []

        def copy_one(*names: Any, **options: Any) -> Any:
            copied.append(names)
            if len(copied) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return copyfile(*names, **options)

        copyfile, shutil.copyfile = shutil.copyfile, copy_one
        sitting(tmp_path)

    INJECTED["train killed"] += 1
    assert ended(in_child(killed_at_the_second_copy)) == -9
    assert not (tmp_path / "tokenizer").exists()
    assert ended(in_child(lambda: sitting(tmp_path))) == 0


def test_training_that_is_killed_goes_on_from_the_last_whole_state(tmp_path: Path) -> None:
    def seen(out: Path) -> int:
        file = out / "state.safetensors"
        return int(load_file(file)["seen"]) if file.exists() else 0

    out = tmp_path / "run"
    for chance in faults(kind := "train killed", 0.06, counted=False):
        before = seen(out)
        killed(kind, lambda: sitting(out), 1 if before else 4, 4.0, chance)
        assert seen(out) >= before
    before = seen(out)
    assert ended(in_child(lambda: sitting(out))) == 0
    assert seen(out) > before


# --- A disk that is full, a folder that cannot be written -------------------------------------------------------------


def test_on_a_full_disk_a_run_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    run_it = ("evaluate", "dense,matched", "--captions", 2, "--steps", 1, "--metrics", "distance", "--device", "cpu")
    assert command(*run_it, "--out", "undisturbed", folder=tmp_path).status == 0
    undisturbed = content(tmp_path / "undisturbed" / "images")
    for number, chance in enumerate(faults("disk full", 0.06)):
        out = tmp_path / str(number)
        said = command(*run_it, "--out", out, folder=tmp_path, before=largest_file(chance.randrange(0, 12_000)))
        assert said.in_one_line, said.err
        assert "cannot write" in said.err
        assert "File too large" in said.err
        assert not list(out.rglob(".*.partial"))
        for file in whole_files(out) if out.exists() else ():
            assert undisturbed.get(str(file.relative_to(out / "images")), b"") in (b"", file.read_bytes())
        assert command(*run_it, "--out", out, folder=tmp_path).status == 0
        assert content(out / "images") == undisturbed


def test_a_file_system_that_is_full_is_told_too(tiny: Any, tmp_path: Path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    try:
        INJECTED["disk full"] += 1
        with pytest.raises(OSError, match=r"cannot write .*small.*: No space left on device"):
            generated(tiny, mounted / "out")
        assert not list(mounted.rglob(".*.partial"))
        assert list(whole_files(mounted))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("place", ["/proc/atedm", "/sys/atedm", "file/out"])
def test_where_nothing_can_be_written_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for words in (
        ("generate", "a red circle", "--steps", 1, "--device", "cpu", "--out", place),
        (
            "evaluate",
            "dense",
            "--captions",
            1,
            "--steps",
            1,
            "--metrics",
            "accuracy",
            "--device",
            "cpu",
            "--out",
            place,
        ),
    ):
        INJECTED["folder cannot be written"] += 1
        said = command(*words, folder=tmp_path)
        assert said.in_one_line, said.err
        assert place in said.err


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "--plot") for name in ("bench", "latency", "cost", "variance", "objects", "errors", "scaling")),
        ("bench", "--out"),
        ("accuracy", "--sheet"),
    ],
)
def test_where_no_picture_can_be_written_is_told_before_any_work(name: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in ("/proc/atedm/x.png", "file/x.png", "."):
        INJECTED["folder cannot be written"] += 1
        start = time.monotonic()
        said = command(name, option, place, folder=tmp_path)
        assert said.in_one_line, said.err
        assert f"cannot write {place}" in said.err
        assert time.monotonic() - start < 20  # not the minutes that each of them takes
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# --- Files that are broken --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder(), tmp_path / "model"))


def test_weights_and_configs_that_are_broken_are_told(model: Path, tmp_path: Path) -> None:
    files = sorted(file for file in model.rglob("*") if file.is_file() and file.suffix in (".safetensors", ".json"))
    files = [file for file in files if file.parent.name in ("model", "unet", "vae", "scheduler", "tokenizer")] + [
        file for file in files if file.parent.name in ("text_encoder", "text_encoder_2")
    ]
    for number, chance in enumerate(faults("model file broken", 0.2)):
        file = files[number % len(files)]
        whole = file.read_bytes()
        file.write_bytes(broken(whole, chance))
        out = tmp_path / f"out-{number}"
        said = command(
            "generate", "a red circle", "--model", model, "--steps", 1, "--device", "cpu", "--out", out,
            folder=tmp_path,
        )  # fmt: skip
        if said.status == 0:  # it did not need what was broken
            with Image.open(out / "pruned-0.png") as picture:
                assert picture.convert("RGB").size == (128, 128)
            is_weights = file.suffix == ".safetensors" and file.parent != model  # where a judge lies that draws nothing
            assert not is_weights or file.stat().st_size == len(whole), f"{file} was cut and taken all the same"
        else:
            assert said.in_one_line, said.err
        file.write_bytes(whole)


def test_what_a_run_wrote_and_somebody_broke_is_told_or_made_again(tmp_path: Path) -> None:
    run_it = (
        "evaluate", "dense,matched", "--captions", 2, "--steps", 1, "--metrics", "distance,accuracy,clip,fid",
        "--device", "cpu", "--out", "out",
    )  # fmt: skip
    assert command(*run_it, folder=tmp_path).status == 0
    results = (tmp_path / "out" / "results.json").read_text()
    files = sorted(file for file in (tmp_path / "out").rglob("*") if file.suffix in (".png", ".json"))
    for number, chance in enumerate(faults("result file broken", 0.12)):
        file = files[number % len(files)]
        whole = file.read_bytes()
        file.write_bytes(broken(whole, chance))
        said = command(*run_it, folder=tmp_path)
        if said.status == 0:
            assert (tmp_path / "out" / "results.json").read_text() == results
        else:
            assert said.in_one_line, said.err
            assert file.name in said.err, (file, said.err)
            file.write_bytes(whole)


def test_pictures_and_captions_that_are_broken_are_told(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    folder = coco_folder(tmp_path / "coco")
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "prompts.csv").write_text('prompt\na red circle\n"a, quoted"\n')
    common = ("--steps", 1, "--device", "cpu", "--out", "out")
    score = ("--captions", 2, "--metrics", "distance,fid", "--fid-features", "tiny")
    asked: dict[Path, tuple[Any, ...]] = {
        folder / "annotations" / "captions_val2017.json": ("evaluate", "dense", "--prompts", folder, *score, *common),
        folder / "val2017" / "000000000003.jpg": ("evaluate", "dense", "--prompts", folder, *score, *common),
        tmp_path / "mask.png": ("generate", "a red circle", "--protect", "mask.png", *common),
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


# --- Numbers that are none, and types that do not fit -----------------------------------------------------------------


def poison(x: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """Put NaNs or infinities into the first of a batch."""
    x = x.clone()
    value = chance.choice([float("nan"), float("inf"), -float("inf")])
    where = torch.rand(x[0].shape, generator=torch.Generator().manual_seed(chance.randrange(1000)))
    x[0][where < chance.choice([0.01, 0.5, 2.0])] = value
    return x


CONFIGS = {
    **PRESETS,
    **{f"{mode} map": PruningConfig(map_mode=mode) for mode in ("full", "blocked", "sampled")},
    "words": PruningConfig(ranking="cross-attention-power"),
    "cosine": PruningConfig(similarity="cosine"),
    "bicubic": PruningConfig(recovery="bicubic"),
    "facility location": PRESETS["matched"].replace(ranking="facility-location"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_that_are_none_stay_with_their_image(name: str) -> None:
    """The other images of the batch are bit for bit what they are without, and the next call is as if nothing was."""
    unet = sdxl_unet()
    with atedm.pruned(unet, CONFIGS[name]):
        for chance in faults("NaN or infinity in the latents", 0.1 / len(CONFIGS)):
            call = inputs(unet)
            whole = run(unet, **call)
            poisoned = run(unet, **(call | {"sample": poison(call["sample"], chance)}))
            assert torch.equal(poisoned[1], whole[1])
            assert not torch.isfinite(poisoned[0]).all()
            assert torch.equal(run(unet, **call), whole)


@pytest.mark.parametrize("mode", ["full", "blocked"])
def test_numbers_that_are_none_in_a_map_give_places_that_are_there(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for chance in faults("NaN or infinity in the map", 0.02):
        q, k = (torch.randn(2, 3, 24, 8, generator=generator) for _ in "qk")
        bad_q, bad_k = (poison(x, chance) if chance.random() < 0.7 else x for x in (q, k))
        if mode == "blocked":
            scores, whole = scores_in_blocks(bad_q, bad_k, 0.3), scores_in_blocks(q, k, 0.3)
            importance = scores.importance
            source = scores.source(importance.topk(9).indices.sort().values)
            assert ((source >= 0) & (source < 9)).all()
        else:
            importance, whole = rank_by_attention(bad_q, bad_k, 0.3).importance, rank_by_attention(q, k, 0.3)
        assert torch.equal(importance[1], whole.importance[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_type_that_does_not_fit_is_refused_as_by_the_dense_model(dtype: torch.dtype) -> None:
    unet = sdxl_unet()
    call = inputs(unet)
    wrong = call | {"sample": call["sample"].to(dtype)}
    dense = run(unet, **call)
    with pytest.raises(RuntimeError) as refused:
        unet(timestep=LATE, **wrong)
    for name in ("paper", "matched"):
        INJECTED["wrong type"] += 1
        with atedm.pruned(unet, name):
            pruned = run(unet, **call)
            with pytest.raises(RuntimeError) as told:
                unet(timestep=LATE, **wrong)
            assert str(told.value) == str(refused.value)
            assert torch.equal(run(unet, **call), pruned)
    assert torch.equal(run(unet, **call), dense)


# --- Errors anywhere --------------------------------------------------------------------------------------------------


class Injected(Exception):
    pass


def test_an_error_in_any_module_leaves_nothing_behind() -> None:
    pipe = sdxl_pipeline(small_unet())
    dense, before = draw(pipe), snapshot(pipe.unet)
    modules = [module for module in pipe.unet.modules() if module is not pipe.unet]
    fresh = {}
    for name in ("paper", "matched"):
        with atedm.pruned(pipe, name):
            fresh[name] = draw(pipe)
    for chance in faults("error in a module", 0.12):
        name = chance.choice([*fresh])
        calls = chance.randrange(8)

        def fail(*_: Any) -> None:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise chance.choice([Injected, KeyboardInterrupt])  # noqa: B023

        atedm.apply(pipe, name)
        hook = chance.choice(modules).register_forward_pre_hook(fail)
        try:
            draw(pipe)
        except (Injected, KeyboardInterrupt):
            pass
        finally:
            hook.remove()
        assert torch.equal(draw(pipe), fresh[name])
        atedm.remove(pipe)
        assert torch.equal(draw(pipe), dense)
    assert snapshot(pipe.unet).keys() == before.keys()


# --- Memory that runs out ---------------------------------------------------------------------------------------------


def ranked(mode: str, file: Path) -> None:
    """Rank 8,192 tokens, whose map in float32 takes 256 MiB, and write down what came out."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 8192, 16, generator=generator) for _ in "qk")

    def rank(mode: Any) -> torch.Tensor:
        scores = scores_in_blocks(q, k, 0.25) if mode == "blocked" else rank_by_attention(q, k, 0.25)
        return scores.importance

    logging.getLogger("atedm").addHandler(logging.StreamHandler())
    with torch.no_grad():
        torch.save(with_memory_there_is(rank, mode, can_be_smaller=True), file)


def test_where_memory_runs_out_for_a_map_it_is_made_in_blocks_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(in_child(functools.partial(ranked, "blocked", tmp_path / "blocked.pt"))) == 0
    blocked = torch.load(tmp_path / "blocked.pt")
    for number, chance in enumerate(faults("out of memory in the map", 0.02)):
        starve, file = memory_left(chance.randrange(80, 250) * 2**20), tmp_path / f"{number}.pt"
        assert ended(in_child(lambda starve=starve, file=file: (starve(), ranked("full", file)))) == 0  # type: ignore[misc]
        assert torch.equal(torch.load(file), blocked)
        assert "no memory for attention maps in map_mode 'full'" in capfd.readouterr().err
    assert ended(in_child(functools.partial(ranked, "full", tmp_path / "full.pt"))) == 0
    assert "no memory" not in capfd.readouterr().err
    torch.testing.assert_close(torch.load(tmp_path / "full.pt"), blocked)


def test_other_errors_of_a_map_are_not_caught() -> None:
    def fail(mode: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        with_memory_there_is(fail, "full", can_be_smaller=True)


def test_memory_that_runs_out_where_nothing_is_smaller_is_told_as_it_is() -> None:
    def fail(mode: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    for mode, can in (("full", False), ("blocked", True), ("sampled", True), (scores_in_blocks, True)):
        INJECTED["out of memory in the map"] += 1
        with pytest.raises(torch.OutOfMemoryError):
            with_memory_there_is(fail, copy.copy(mode), can_be_smaller=can)
