"""CLIP score: open_clip's own numbers, and a shipped CLIP that feels every attribute of a held-out caption."""

from __future__ import annotations

import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from atedm.lab.scores.clip_score import TINY_CLIP, clip_scores, image_features, open_clip_model
from atedm.tiny import weights_folder
from atedm.tiny.objects import OBJECTS
from atedm.tiny.scenes import BACKGROUNDS, Scene, sample_scene
from atedm.tiny.train_clip import CLIP, check, train_clip
from atedm.tiny.wrong_captions import KINDS, changed
from painted_objects import keep_discs
from rendered_scenes import rendered_scenes

SHIPPED = weights_folder() / CLIP
SCENES, IMAGES = rendered_scenes()


def pictures(count: int, start: int = 0) -> tuple[list[Scene], list[Image.Image]]:
    """Some of the rendered scenes that are kept, and their pictures."""
    some = slice(start, start + count)
    return SCENES[some], [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in IMAGES[some]]


def scores(files: list[Path], prompts: list[str], **options: Any) -> np.ndarray:
    return np.array(clip_scores(open_clip_model(TINY_CLIP, device="cpu"), files, prompts, **options))


def saved(images: list[Image.Image], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(images))]


@torch.inference_mode()
def test_it_is_the_cosine_of_what_open_clip_gives(tmp_path: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{SHIPPED}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{SHIPPED}")
    model.eval()
    (scene,), (picture,) = pictures(1)
    clip = open_clip_model(TINY_CLIP, device="cpu")
    for prompt in (scene.caption, "a duck on a gray background"):
        pixels = clip.preprocess(picture)[None] / 2 + 0.5
        look = model.encode_image((pixels - 0.5) / 0.5)[0].double().numpy()
        words = model.encode_text(tokenizer([prompt]))[0].double().numpy()
        cosine = look @ words / np.linalg.norm(look) / np.linalg.norm(words)
        assert scores(saved([picture], tmp_path), [prompt]) == pytest.approx(cosine, abs=1e-5)


def test_images_score_the_same_in_any_batch_and_order(tmp_path: Path) -> None:
    scenes, images = pictures(5)
    prompts = [scene.caption for scene in scenes]
    files = saved(images, tmp_path)
    one = scores(files, prompts, batch=2)
    np.testing.assert_allclose(one, scores(files, prompts), atol=1e-5)
    assert len(set(one.round(4))) == 5
    np.testing.assert_allclose(scores(files[::-1], prompts[::-1])[::-1], one, atol=1e-5)
    assert scores(saved([images[0].convert("L")], tmp_path / "grey"), prompts[:1]) < one[0]
    palette = images[0].resize((300, 300)).convert("P")  # Pillow would resize its indices
    same = [saved([image], tmp_path / image.mode)[0] for image in (palette, palette.convert("RGB"))]
    assert scores(same[:1], prompts[:1]) == pytest.approx(scores(same[1:], prompts[:1]), abs=1e-6)
    assert scores([], []).size == 0


@torch.inference_mode()
def test_image_features_are_those_of_the_score() -> None:
    _, (picture,) = pictures(1)
    picture = picture.resize((128, 128))
    clip = open_clip_model(TINY_CLIP, device="cpu")
    assert clip.size == (128, 128)
    features = image_features(clip, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float())
    torch.testing.assert_close(features, clip.model.encode_image(clip.preprocess(picture)[None]), rtol=1e-4, atol=1e-5)


def test_a_change_of_one_kind_is_that_and_says_another_thing() -> None:
    rng = np.random.default_rng(6)
    said_none = dict.fromkeys(KINDS, 0)
    for _ in range(300):
        scene = sample_scene(rng)
        for kind in KINDS:
            other = changed(scene, kind, rng)
            if other is None:
                said_none[kind] += 1
                continue
            same = {
                "count": len(scene.objects) == len(other.objects),
                "object": {*scene.objects} == {*other.objects},
                "relation": (scene.objects, scene.relation) == (other.objects, other.relation),
                "size": scene.size == other.size,
                "background": scene.background == other.background,
            }
            assert not same[kind]
            assert other.caption != scene.caption
            follows = {"count": {"object", "relation", "size"}, "object": {"relation"}}
            assert {name for name, is_same in same.items() if not is_same} <= {kind} | follows.get(kind, set())
    assert said_none["count"] == said_none["object"] == 0
    assert said_none["relation"] > 30
    assert said_none["size"] > 200


@pytest.mark.parametrize(("kind", "share"), [("count", 0.85), ("object", 0.9), ("background", 0.9)])
def test_the_score_of_a_held_out_caption_falls_when_one_thing_in_it_is_wrong(
    kind: str, share: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    scenes, images = pictures(36)
    files = saved(images, tmp_path)
    own = scores(files, [scene.caption for scene in scenes])
    wrong = [changed(scene, kind, rng) for scene in scenes]
    others = scores(files, [scene.caption for scene in wrong if scene is not None])
    assert (own > others).mean() >= share, (own > others).mean()


def test_the_shipped_folder_is_small_plain_and_half_precision() -> None:
    files = {file.name for file in SHIPPED.iterdir()}
    assert files == {"open_clip_config.json", "open_clip_model.safetensors"} | {
        file.name for file in (weights_folder() / "tokenizer").iterdir()
    }
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 3e6
    with safe_open(SHIPPED / "open_clip_model.safetensors", framework="pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert kinds <= {torch.float16, torch.int64}
    assert next(open_clip_model(TINY_CLIP, device="cpu").model.parameters()).dtype == torch.float32


@torch.inference_mode()
def test_words_are_those_of_the_shipped_tokenizer_and_are_read_up_to_the_end_token() -> None:
    clip = open_clip_model(TINY_CLIP, device="cpu")
    words = CLIPTokenizer.from_pretrained(weights_folder() / "tokenizer")
    longest = Scene(("alarm clock", "fire engine", "hot dog"), "pink").caption
    ids = clip.tokenizer([longest, "a rose on a pink background"])
    assert ids.tolist() == words([longest, "a rose on a pink background"], padding="max_length").input_ids
    assert clip.model.vocab_size == len(words)
    assert clip.model.text_eos_id == words.eos_token_id
    assert ids.shape == (2, 24)
    assert (ids[0] == words.eos_token_id).sum() > 1  # there is room for the longest caption
    said = " ".join([*BACKGROUNDS.values(), *OBJECTS]).split()
    assert all(len(words(word).input_ids) == 3 for word in said)
    captured: list[Tensor] = []
    clip.model.ln_final.register_forward_hook(lambda _, __, output: captured.append(output))
    pooled = clip.model.encode_text(ids)
    ends = (ids == words.eos_token_id).int().argmax(dim=1)
    torch.testing.assert_close(pooled, captured[0][torch.arange(2), ends] @ clip.model.text_projection)


def test_unequal_lengths_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        scores(saved(pictures(2)[1], tmp_path), ["a"])
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.png"):
        scores([tmp_path / "broken.png"], ["a"])
    with pytest.raises(ValueError, match=r"cannot read the image .*absent\.png"):
        scores([tmp_path / "absent.png"], ["a"])


def refused(model: str, pretrained: str = "laion2b_s34b_b88k") -> str:
    with pytest.raises(ValueError, match="cannot open the CLIP model") as error:
        open_clip_model(model, pretrained, device="cpu")
    assert "\n" not in str(error.value)
    assert "what works is" in str(error.value)
    return str(error.value)


def test_models_that_cannot_be_had_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ViT-nothing" in refused("ViT-nothing")
    assert "no_such_tag" in refused("ViT-B-32", "no_such_tag")
    assert "nowhere" in refused(f"local-dir:{tmp_path / 'nowhere'}")

    def no_network(*_: object, **__: object) -> str:
        raise OSError("name resolution failed\nand a second line")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    said = refused("ViT-g-14")
    assert "ViT-g-14 with the weights 'laion2b_s34b_b88k'" in said
    assert "name resolution failed" in said


def test_a_folder_without_weights_is_not_scored_with_random_ones(tmp_path: Path) -> None:
    for file in SHIPPED.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    assert str(tmp_path) in refused(f"local-dir:{tmp_path}")


def test_without_open_clip_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"atedm\[lab\]"):
        open_clip_model(TINY_CLIP)


def test_training_goes_on_reads_no_held_out_caption_and_says_how_good_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []
    taught: list[str] = []
    real = open_clip.get_tokenizer

    def listening(name: str) -> Any:
        tokenizer = real(name)
        return lambda texts: read.extend(texts) or tokenizer(texts)

    def checked(*where: Any) -> dict[str, float]:  # whose captions are held-out ones
        taught.extend(read)
        shares = check(*where)
        read.clear()
        return shares

    keep_discs(tmp_path / "objects")
    for part in ("vae", "tokenizer"):
        shutil.copytree(weights_folder() / part, tmp_path / part)
    monkeypatch.setattr(open_clip, "get_tokenizer", listening)
    monkeypatch.setattr("atedm.tiny.train_clip._CHECKED", 16)
    monkeypatch.setattr("atedm.tiny.train_clip.check", checked)
    weights = []
    for _ in range(2):
        train_clip(tmp_path, minutes=0.02, batch=8, uses=10, seed=0, archive=None)
        weights.append(load_file(tmp_path / CLIP / "open_clip_model.safetensors"))
    assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert weights[0]["token_embedding.weight"].sub(weights[1]["token_embedding.weight"]).abs().mean() < 0.01
    tried = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"through the autoencoder .*relation 0\.\d{3}.*1 in 100 0\.\d{3}", tried), tried
    assert len(taught) > 8
    assert len(taught) % (8 * (1 + len(KINDS))) == 0
    assert not [text for text in taught if zlib.crc32(text.encode()) % 20 == 0]  # what Scene.held_out is
