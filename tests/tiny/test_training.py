"""The scenes, and that training resumes and gives pipelines. The real objects are fetched for training only."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from atedm.app.models import load_pipeline
from atedm.tiny import weights_folder
from atedm.tiny.assemble import assemble
from atedm.tiny.autoencoder import build_autoencoder
from atedm.tiny.checkpoint import save_state
from atedm.tiny.data import ScenePool, crop_around_objects, tokenize
from atedm.tiny.denoiser import Denoiser, text_of, whole_picture
from atedm.tiny.distill import distill
from atedm.tiny.download import load_atlas
from atedm.tiny.features import WIDTHS, Teacher, distance
from atedm.tiny.few_steps import with_few_steps
from atedm.tiny.judge import JUDGE
from atedm.tiny.layout import place_objects
from atedm.tiny.models import TRANSFORMER, build_model
from atedm.tiny.noise_paths import FlowPath, NoisePath, VPath, training_loss
from atedm.tiny.objects import FEWER_OBJECTS, OBJECTS, with_article
from atedm.tiny.optimizers import KernelMuon
from atedm.tiny.pipeline import open_run
from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import BACKGROUNDS, RELATIONS, Scene, held_out_scenes, sample_scene
from atedm.tiny.text import TOKENS, build_text_encoders, build_tokenizer
from atedm.tiny.text_lessons import last_tokens, teach_text_encoders
from atedm.tiny.train import train
from atedm.tiny.train_judge import train_judge
from atedm.tiny.transformer import CaptionOnlySD3Pipeline, FlowDenoiser, build_transformer
from atedm.tiny.unet import build_unet
from painted_objects import discs, keep_discs


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas.of(discs())


def test_articles_and_plurals() -> None:
    assert [with_article(name) for name in ("duck", "owl", "unicorn", "cherries", "small owl")] == [
        "a duck",
        "an owl",
        "a unicorn",
        "cherries",
        "a small owl",
    ]


def test_captions_read_as_people_write_them() -> None:
    assert (
        Scene(("duck", "volcano"), "night", "in front of").caption == "a duck in front of a volcano under a night sky"
    )
    assert Scene(("duck", "owl", "cherries"), "sea").caption == "a duck, an owl and cherries by the sea"
    assert Scene(("rose",), "pink", size="large", is_short=True).caption == "a large rose"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((("duk",), "sea"), "did you mean 'duck'"),
        ((("duck",), "see"), "did you mean 'sea'"),
        ((("duck", "owl"), "sea"), "two objects need a relation"),
        ((("duck", "duck"), "sea", "above"), "different objects"),
        ((("duck", "owl"), "sea", "below"), "unknown relation"),
        ((("duck", "owl"), "sea", "above", "small"), "stands alone"),
    ],
)
def test_wrong_words_are_refused(words: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(*words)  # type: ignore[arg-type]


def test_held_out_captions_are_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    trained = [sample_scene(rng) for _ in range(300)]
    kept = held_out_scenes(100)
    assert not any(scene.held_out for scene in trained)
    assert all(scene.held_out for scene in kept)
    assert held_out_scenes(100) == kept
    assert {scene.background for scene in trained} == set(BACKGROUNDS)
    assert {len(scene.objects) for scene in trained} == {1, 2, 3}


def test_every_caption_fits_the_text_encoders(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for name in OBJECTS:
        for word in name.split():
            assert len(tokenizer(word).input_ids) == 3, word  # itself between a beginning and an end
    longest = max((scene.caption for scene in held_out_scenes(500)), key=lambda text: len(text.split()))
    assert len(tokenizer(longest).input_ids) <= TOKENS


@given(seed=st.integers(0, 10_000))
def test_places_agree_with_the_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    placed = {one.name: one for one in place_objects(scene, rng)}
    boxes = [placed[name] for name in scene.objects]
    for box in boxes:
        assert 0.4 * box.side < box.x < 1 - 0.4 * box.side
        assert 0.4 * box.side < box.y < 1 - 0.4 * box.side
    if len(boxes) == 3:
        assert boxes[0].x < boxes[1].x < boxes[2].x
    elif scene.relation == "left of":
        assert boxes[0].x + 0.3 < boxes[1].x
    elif scene.relation == "above":
        assert boxes[0].y + 0.3 < boxes[1].y
        assert not boxes[0].stands
    elif scene.relation == "in front of":
        assert boxes[0].side < boxes[1].side
        assert boxes[0].y > boxes[1].y


def test_the_same_seed_draws_the_same_picture_at_every_size(atlas: Atlas) -> None:
    scenes = held_out_scenes(8)
    large, again, small = (render(scenes, atlas, np.random.default_rng(3), side) for side in (128, 128, 64))
    assert torch.equal(large.images, again.images)
    assert large.images.shape == (8, 3, 128, 128)
    assert large.images.min() >= 0
    assert large.images.max() <= 1
    shrunk = torch.nn.functional.avg_pool2d(large.images, 2)
    assert (shrunk - small.images).abs().mean() < 0.02


def test_masks_show_what_is_in_front(atlas: Atlas) -> None:
    scene = Scene(("duck", "volcano"), "night", "in front of")
    masks = render([scene] * 4, atlas, np.random.default_rng(0), 64).masks
    front, behind, none = masks.unbind(1)
    assert (front.amax((1, 2)) > 0.99).all()
    assert (none == 0).all()
    assert ((front + behind) <= 1.001).all()
    assert (behind.sum((1, 2)) > front.sum((1, 2))).all()  # it is larger, and mostly seen


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold_in_the_masks(relation: str, atlas: Atlas) -> None:
    masks = render([Scene(("duck", "owl"), "blue", relation)] * 3, atlas, np.random.default_rng(1), 64).masks
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    first, second = (
        torch.stack([(m * x).sum((1, 2)), (m * y).sum((1, 2))]) / m.sum((1, 2)) for m in masks[:, :2].unbind(1)
    )
    place = {"left of": first[0] < second[0], "above": first[1] < second[1], "in front of": first[1] > second[1]}
    assert place[relation].all()


def test_another_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not @lobehub/fluent-emoji-3d@1\.1\.0"):
        load_atlas(tmp_path / "objects", tmp_path / "a.tgz")


def test_the_model_is_small_enough_to_ship(tmp_path: Path) -> None:
    encoders = build_text_encoders(build_tokenizer(tmp_path))
    parts = [build_unet(), build_autoencoder(), *encoders]
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) < 11.5e6  # 23 MB in 16 bits


def test_last_tokens_are_those_of_the_names(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for scene in held_out_scenes(100):
        ids = tokenizer(scene.caption).input_ids
        words = [tokenizer.decode(ids[place]).strip() for place in last_tokens(tokenizer, scene)]
        assert words == [name.split()[-1] for name in scene.objects]


def test_lessons_teach_what_objects_look_like(tmp_path: Path, atlas: Atlas) -> None:
    tokenizer = build_tokenizer(tmp_path)
    torch.manual_seed(0)
    encoders = build_text_encoders(tokenizer)
    said: list[str] = []
    teach_text_encoders(encoders, tokenizer, atlas, 150, scenes=128, batch=16, every=75, report=said.append)
    errors = [float(line.split("looks ")[1].split(",")[0]) for line in said]
    assert len(errors) == 2
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3, 3)])
def test_kernels_are_stepped_as_the_matrices_they_are(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = KernelMuon([kernel], lr=0.1, weight_decay=0.01)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01)
    for _ in range(3):
        gradient = torch.randn(shape)
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert kernel.grad is None
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has the pictures of its objects and an untrained autoencoder."""
    folder = tmp_path / "run"
    keep_discs(folder / "objects")
    build_autoencoder().save_pretrained(folder / "vae")
    return folder


def call(command: Callable[..., None], run: Path, options: str) -> str:
    """What a command prints."""
    app = typer.Typer()
    app.command()(command)
    shared = " --canvas 64 --batch 2 --pool 32 --eager"
    result = CliRunner().invoke(app, [str(run), *(options + shared).split()], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_run_that_was_cut_off_goes_on_by_the_same_command(run: Path) -> None:
    def sit(images: int) -> str:
        return call(train, run, f"--images {images} --sample-minutes 0 --text-steps 0")

    sit(4)
    first = load_file(run / "state.safetensors")
    assert int(first["seen"]) == 4
    sit(6)
    second = load_file(run / "state.safetensors")
    assert int(second["seen"]) == 6
    name = "model.unet.conv_in.weight"
    assert not torch.equal(first[name], second[name])
    assert first.keys() == second.keys()
    assert "this run has seen 6 images already" in sit(6)


def test_a_run_is_distilled_and_assembled_into_a_pipeline(run: Path, tmp_path: Path) -> None:
    denoiser = Denoiser(build_text_encoders(build_tokenizer(run / "tokenizer")), build_unet(), compiled=False)
    save_state(run, denoiser, copy.deepcopy(denoiser), [], seen=1)
    for images in (2, 4):  # the second sitting goes on from the first
        call(distill, run, f"--images {images} --rank 2")
    assert int(load_file(run / "distillation.safetensors")["seen"]) == 4
    assemble(run, tmp_path / "folder")
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    many = pipe("a duck", **asked, generator=torch.manual_seed(0)).images
    lora = tmp_path / "folder" / "lora"
    with pytest.raises(FileNotFoundError, match="no LoRA for few steps"):
        with_few_steps(pipe, tmp_path)
    by_peft = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder")
    by_peft.load_lora_weights(lora)
    by_peft.scheduler = with_few_steps(pipe, lora).scheduler
    by_peft.set_progress_bar_config(disable=True)
    ours, theirs = (
        one("a duck", **asked, guidance_scale=1.0, generator=torch.manual_seed(0)).images for one in (pipe, by_peft)
    )
    assert many.shape == ours.shape == (1, 64, 64, 3)
    assert np.abs(ours - many).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_judge_is_trained_goes_on_and_says_how_well_it_reads(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atedm.tiny.train_judge._CHECKED", 8)
    weights = []
    for _ in range(2):
        train_judge(run, minutes=0.02, batch=4, uses=10, lr=1e-3, seed=0, archive=None)
        weights.append(load_file(run / JUDGE))
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    tried = capsys.readouterr().out.splitlines()[-2:]
    for what, line in zip(("rendered", "through the autoencoder"), tried, strict=True):
        assert re.fullmatch(rf"{what} count [\d.]+%, object [\d.]+%, .*all [\d.]+%", line), line


def test_a_transformer_trains_and_becomes_a_pipeline(run: Path, tmp_path: Path) -> None:
    for images in (4, 6):  # the second sitting goes on from the first
        call(train, run, f"--transformer --images {images} --text-steps 0")
    pipe = open_run(run)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    image = pipe("a duck", **asked, generator=torch.manual_seed(0)).images
    assert image.shape == (1, 64, 64, 3)
    # The pipeline gives the model what it was trained on.
    ids = tokenize(pipe.tokenizer, ["a duck"])
    words, pooled = text_of(pipe.text_encoder, pipe.text_encoder_2, ids)
    given = pipe.encode_prompt("a duck", None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(given[0], words)
    torch.testing.assert_close(given[2], torch.cat([torch.zeros_like(pooled), pooled], dim=-1))
    call(distill, run, "--images 2 --rank 2")
    assemble(run, tmp_path / "folder")
    again = CaptionOnlySD3Pipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert np.abs(again("a duck", **asked, generator=torch.manual_seed(0)).images - image).max() < 0.05
    few = with_few_steps(again, tmp_path / "folder" / "lora")("a duck", **asked, guidance_scale=1.0).images
    assert np.isfinite(few).all()
    assert sum(file.stat().st_size for file in (tmp_path / "folder").rglob("*.safetensors")) < 12e6


def test_features_of_the_teacher_lie_where_the_tokens_are_and_are_learned(atlas: Atlas) -> None:
    pipe = load_pipeline("tiny", device="cpu")
    teacher = Teacher(weights_folder(), pipe.tokenizer, torch.device("cpu"))
    pools = [
        ScenePool(atlas, pipe.vae, pipe.tokenizer, 256, size=32, uses=2, crop=64, teacher=one)
        for one in (teacher, None)
    ]
    with_features, without = (pool.draw(4) for pool in pools)
    assert [one.shape for one in with_features.features] == [(4, 16, 96), (4, 16, 320)]
    assert without.features == ()
    # An object that moves takes its features along: here by the side of a token.
    image = torch.full((2, 3, 256, 256), 0.7)
    for row, left in enumerate((96, 112)):
        image[row, :, 96:160, left : left + 64] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    picture = pipe.vae.encode(image * 2 - 1).latents
    ids = tokenize(pipe.tokenizer, ["a duck", "a duck"])
    for features in teacher.features(picture, ids, whole_picture(256, 2, torch.device("cpu"))):
        here, there = features.float().unflatten(1, (16, 16))[:, 4:12]
        moved = (here[:, 4:11] - there[:, 5:12]).square().mean()
        assert moved < 0.5 * (here[:, 4:11] - there[:, 4:11]).square().mean()
    model, path, _ = build_model(
        TRANSFORMER, pipe.tokenizer, torch.device("cpu"), compiled=False, teacher_widths=WIDTHS
    )
    loss = training_loss(model, with_features, path)
    loss.backward()
    assert all(said.weight.grad.abs().sum() > 0 for said in model.to_teacher)
    assert distance([one.float() for one in with_features.features], with_features.features) == 0
    assert not any(block._forward_hooks for block in model.transformer.transformer_blocks)


def test_scenes_hold_only_the_objects_that_are_asked_for() -> None:
    assert set(FEWER_OBJECTS) < set(OBJECTS)
    scenes = held_out_scenes(64, names=FEWER_OBJECTS)
    drawn = {name for scene in scenes for name in scene.objects}
    assert drawn <= set(FEWER_OBJECTS)
    assert len(drawn) > 20
    assert all(scene.held_out for scene in scenes)


def test_a_square_has_the_places_that_it_had_in_the_picture(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    model = FlowDenoiser(build_text_encoders(tokenizer), build_transformer(), tokenizer, compiled=False)
    seen: list[Tensor] = []
    first = model.transformer.transformer_blocks[0]
    first.register_forward_pre_hook(lambda _, __, given: seen.append(given["hidden_states"]), with_kwargs=True)
    picture = torch.randn(2, 4, 64, 64)
    ids, keep, times = tokenize(tokenizer, ["a duck"] * 2), torch.ones(2), torch.full((2,), 500.0)
    squares = torch.stack([picture[0, :, 16:48, 8:40], picture[1, :, :32, 32:]])
    corners = torch.tensor([[64, 32], [0, 128]])
    sizes = torch.cat([torch.full((2, 2), 256), corners, torch.full((2, 2), 128)], dim=1)
    with torch.no_grad():
        model(picture, times, ids, keep, whole_picture(256, 2, torch.device("cpu")))
        model(squares, times, ids, keep, sizes)
    whole, cut = seen[0].unflatten(1, (16, 16)), seen[1].unflatten(1, (8, 8))
    torch.testing.assert_close(cut, torch.stack([whole[0, 4:12, 2:10], whole[1, :8, 8:]]))
    assert not model.transformer.pos_embed._forward_hooks


def test_crops_are_about_an_object_and_say_where_they_are(atlas: Atlas) -> None:
    rng = np.random.default_rng(3)
    rendered = render([sample_scene(rng) for _ in range(8)], atlas, rng, 256)
    squares, corners = crop_around_objects(rendered, 96, rng)
    for square, (top, left), image, masks in zip(
        squares, corners.tolist(), rendered.images, rendered.masks, strict=True
    ):
        assert torch.equal(square, image[:, top : top + 96, left : left + 96])
        inside = masks[:, top : top + 96, left : left + 96].sum((1, 2)) / masks.sum((1, 2)).clamp_min(1)
        assert inside.max() > 0.3  # a large object is not there as a whole
    whole, at = crop_around_objects(rendered, 256, rng)
    assert torch.equal(whole, rendered.images)
    assert not at.any()


@pytest.mark.parametrize("path", [VPath(torch.device("cpu")), FlowPath(torch.device("cpu"), 1.5)], ids=["v", "flow"])
def test_a_right_answer_is_read_as_the_picture_and_the_noise(path: NoisePath) -> None:
    generator = torch.Generator().manual_seed(0)
    times = path.grid(50)
    assert len(times) == 51
    assert (times.diff() > 0).all()
    picture, noise = (torch.randn(51, 4, 3, 3, generator=generator) for _ in range(2))
    noisy = path.noised(picture, noise, times)
    torch.testing.assert_close(noisy[0], picture[0])
    torch.testing.assert_close(noisy[-1], noise[-1], rtol=0, atol=2e-3)
    found = path.read(noisy, path.target(picture, noise, times), times)
    torch.testing.assert_close(found, (picture, noise))
    drawn = path.draw_times(1000, torch.device("cpu"))
    assert times[0] <= drawn.min()
    assert drawn.max() <= times[-1]
    assert drawn.float().mean() > 500
