"""FID: clean-fid's number on the right images, against the formula, and an interval that covers what it says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import cleanfid.inception_torchscript
import numpy as np
import open_clip
import pytest
import scipy.linalg
import torch
from PIL import Image

from atedm.lab.scores.clip_score import TINY_CLIP
from atedm.lab.scores.fid import Extractor, fid, fid_interval, file_features, open_extractor
from atedm.tiny import weights_folder
from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import sample_scene
from painted_objects import discs

ATLAS = Atlas.of(discs())
AVERAGES = Extractor(lambda pixels: pixels.mean(dim=(2, 3)), torch.device("cpu"))


def of_folder(folder: Path, extractor: Extractor | None = None, **options: int) -> np.ndarray:
    extractor = open_extractor(TINY_CLIP, device="cpu") if extractor is None else extractor
    return file_features(extractor, sorted(folder.iterdir()), **options)


def save(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def scenes(count: int, seed: int, background: str | None = None) -> np.ndarray:
    """(count, 128, 128, 3) uint8 pictures of training scenes, all on one background if asked."""
    rng = np.random.default_rng(seed)
    some = [sample_scene(rng) for _ in range(count)]
    if background:
        some = [replace(scene, background=background) for scene in some]
    images = render(some, ATLAS, rng, 128).images
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def reference_fid(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 √(C1 C2)), in float64."""
    (m1, c1), (m2, c2) = ((x.mean(axis=0), np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b))
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real))


def test_it_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(90, 7)) @ rng.normal(size=(7, 7))
    b = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)) + rng.normal(size=7)
    assert fid(a, b) == pytest.approx(reference_fid(a, b), rel=1e-9)
    assert fid(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(reference_fid(a, b), rel=1e-5)


def test_independent_features_have_a_closed_form() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 4))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # mean 0, covariance 1, exactly
    shift, scale = np.array([0.5, 0.0, -1.0, 2.0]), np.array([1.0, 3.0, 0.5, 2.0])
    assert fid(white * scale + shift, white) == pytest.approx((shift**2).sum() + ((scale - 1) ** 2).sum(), rel=1e-6)


def test_zero_to_itself_and_symmetric_and_more_with_more_noise() -> None:
    rng = np.random.default_rng(2)
    a, b, noise = (rng.normal(size=(80, 6)) for _ in range(3))
    assert fid(a, a) == pytest.approx(0, abs=1e-6)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-6)
    noisy = [fid(a + level * noise, a) for level in (0.5, 1.0, 2.0)]
    assert 0.01 < noisy[0] < noisy[1] < noisy[2]


@pytest.mark.parametrize(("n", "d"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5, 3))])
def test_tables_that_do_not_fit(n: tuple[int, ...], d: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="FID needs two tables"):
        fid(np.zeros(n), np.zeros(d))


def test_rows_are_in_the_order_of_the_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("b.png", "a.PNG", "a.jpeg", "10.webp", "9.bmp")]
    for level, file in enumerate(files):
        Image.new("RGB", (40, 30), (level * 20, 100, 200)).save(file)
    features = file_features(AVERAGES, files, batch=2)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features[:, 0], [0, 20, 40, 60, 80], atol=2)
    np.testing.assert_allclose(file_features(AVERAGES, files, batch=5), features, rtol=1e-6)


def resized(image: np.ndarray, size: int) -> torch.Tensor:
    """(3, size, size) float32: each channel by Pillow's antialiased bicubic filter, not rounded, kept in [0, 255]."""
    channels = [
        np.asarray(Image.fromarray(image[:, :, c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def test_own_extractors_see_what_inception_would(tmp_path: Path) -> None:
    images = np.random.default_rng(3).integers(0, 256, size=(3, 50, 70, 3), dtype=np.uint8)
    seen = []

    def remember(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return pixels.mean(dim=(2, 3))

    of_folder(save(tmp_path / "x", images), Extractor(remember, torch.device("cpu")))
    torch.testing.assert_close(torch.cat(seen), torch.stack([resized(image, 299) for image in images]))


@torch.inference_mode()
def test_features_of_an_open_clip_model_are_its_image_tower_at_its_own_size(tmp_path: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{weights_folder() / 'clip'}")
    model.eval()
    small = scenes(3, seed=4)
    large = small.repeat(3, axis=1).repeat(3, axis=2)
    for name, images in (("small", small), ("large", large)):
        pixels = torch.stack([resized(image, 128) for image in images])
        by_hand = model.encode_image((pixels / 255 - 0.5) / 0.5)
        features = of_folder(save(tmp_path / name, images))
        assert features.shape == (3, 64)
        np.testing.assert_allclose(features, by_hand.numpy(), rtol=1e-4, atol=1e-5)


def test_fid_of_folders_feels_noise_and_a_changed_crowd(tmp_path: Path) -> None:
    clean = scenes(80, seed=5)
    rng = np.random.default_rng(6)

    def noisy(level: float) -> np.ndarray:
        return (clean + level * rng.normal(size=clean.shape)).clip(0, 255).astype(np.uint8)

    crowds = {
        "same": scenes(80, seed=7),
        "noisy": noisy(30.0),
        "noisier": noisy(60.0),
        "pink": scenes(80, seed=8, background="pink"),
    }
    reference = of_folder(save(tmp_path / "clean", clean))
    distance = {name: fid(of_folder(save(tmp_path / name, images)), reference) for name, images in crowds.items()}
    assert 1.1 * distance["same"] < distance["pink"], distance
    assert 0.05 * distance["same"] < distance["noisy"] < distance["noisier"], distance
    assert fid(reference, reference) == pytest.approx(0, abs=1e-4)


def test_the_draws_of_the_interval_are_distances() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(40, 5)) * 1.5 + 0.5, rng.normal(size=(70, 5))
    interval = fid_interval(a, b, draws=100, seed=3)
    assert interval.mean == fid(a, b)
    assert interval == fid_interval(a, b, draws=100, seed=3)
    again = np.random.default_rng(3)
    drawn = np.array([reference_fid(a[again.integers(0, 40, 40)], b) for _ in range(100)])
    low, high = np.percentile(drawn, [2.5, 97.5]) - drawn.mean() + interval.mean
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-6)


def test_the_interval_survives_fewer_images_than_features() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.normal(size=(12, 30)), rng.normal(size=(200, 30)) + 1
    interval = fid_interval(a, b, draws=50)
    assert np.isfinite(interval).all()
    assert interval.low < interval.mean < interval.high


def test_the_interval_covers_what_other_images_would_give() -> None:
    rng = np.random.default_rng(11)
    references = rng.normal(size=(400, 3))

    def made() -> np.ndarray:
        return rng.normal(size=(60, 3)) * [1.5, 1.0, 0.8] + [1.0, 0.0, 0.5]

    expected = np.mean([reference_fid(made(), references) for _ in range(1000)])
    intervals = [fid_interval(made(), references, draws=150, seed=trial) for trial in range(200)]
    assert 0.88 <= np.mean([i.low <= expected <= i.high for i in intervals]) <= 0.99


@pytest.mark.parametrize("content", [b"no image at all", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = save(tmp_path / "x", scenes(3, seed=12))
    broken = folder / "0001.png"
    broken.write_bytes(broken.read_bytes()[:400] if content is None else content)
    with pytest.raises(ValueError, match=r"cannot read the image .*0001\.png"):
        of_folder(folder, AVERAGES)


def test_what_an_extractor_raises_is_passed_on(tmp_path: Path) -> None:
    def fails(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        of_folder(save(tmp_path / "x", scenes(1, seed=13)), Extractor(fails, torch.device("cpu")))


def test_inception_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(fpath: str) -> str:
        raise URLError("name resolution failed")

    monkeypatch.setattr(cleanfid.inception_torchscript, "check_download_inception", no_network)
    with pytest.raises(ValueError, match=r"inception-2015-12-05\.pt.*name resolution failed.*what works") as error:
        open_extractor("inception", device="cpu")
    assert "\n" not in str(error.value)


def test_without_clean_fid_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanfid.fid", None)
    with pytest.raises(ImportError, match=r"atedm\[lab\]"):
        fid(np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(ImportError, match=r"atedm\[lab\]"):
        file_features(AVERAGES, [tmp_path / "x.png"])
