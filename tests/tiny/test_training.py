"""The model that ships: opens as an ordinary pipeline, fits the wheel, draws what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import atedm
from atedm.app.models import load_pipeline
from atedm.tiny import weights_folder
from atedm.tiny.assemble import pipeline_from_run
from atedm.tiny.autoencoder import train_autoencoder
from atedm.tiny.classifier import judge, load_classifier
from atedm.tiny.pictures.judge import accuracy
from atedm.tiny.scenes import Scene, held_out_scenes
from atedm.tiny.text import build_tokenizer


def test_it_is_small_and_holds_safetensors_only() -> None:
    files = [file for file in weights_folder().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}


def test_it_opens_with_plain_diffusers_and_is_sdxl_shaped() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(weights_folder())
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    config = pipe.unet.config
    assert config.addition_embed_type == "text_time"
    assert config.use_linear_projection
    assert list(config.down_block_types) == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    tokens = {shape.place.level: shape.tokens for shape in atedm.apply(pipe).shapes}
    assert tokens == {2: 256, 3: 64}


@pytest.mark.parametrize("word", ["lavender", "checkered", "triangle", "background", "of"])
def test_every_word_of_the_captions_is_one_token(word: str) -> None:
    tokenizer = StableDiffusionXLPipeline.from_pretrained(weights_folder()).tokenizer
    assert len(tokenizer.tokenize(word)) == 1
    assert len(tokenizer.tokenize("a zebra")) > 2


def drawn(pipe: Any, scenes: list[Scene], steps: int, batch: int = 8) -> Tensor:
    """(N, 3, 128, 128) in [0, 1]; image i has the noise of seed i, however it is batched."""
    parts = []
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        images = pipe(
            [scene.caption for scene in some],
            num_inference_steps=steps,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(some))],
            output_type="pt",
        ).images
        parts.append(images)
    return torch.cat(parts)


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    return (-10 * (images - reference).square().flatten(1).mean(1).log10()).tolist()


def test_it_draws_what_held_out_captions_say_dense_and_pruned() -> None:
    pipe = load_pipeline("tiny", device="cpu")
    reader = load_classifier(weights_folder() / "classifier.safetensors")
    scenes = held_out_scenes(6, seed=1)
    dense = drawn(pipe, scenes, 6)
    shares = accuracy([judge(asked, seen) for asked, seen in zip(scenes, reader.read(dense), strict=True)])
    del shares["all"]
    assert min(shares.values()) >= 0.9, shares
    for method in ("dagger", "matched"):
        with atedm.pruned(pipe, method):
            pruned = drawn(pipe, scenes, 6)
        assert 15 < float(np.mean(psnr(pruned, dense))) < 60
        right = [judge(asked, seen).all_right for asked, seen in zip(scenes, reader.read(pruned), strict=False)]
        assert sum(right) >= 5


def test_images_do_not_depend_on_how_they_are_batched() -> None:
    pipe = load_pipeline("tiny", device="cpu")
    scenes = held_out_scenes(3, seed=2)
    with atedm.pruned(pipe, "dagger"):
        one, three = (drawn(pipe, scenes, 4, batch) for batch in (1, 3))
    assert min(psnr(one, three)) > 40


def test_image_to_image_runs_on_the_same_parts() -> None:
    pipe = StableDiffusionXLImg2ImgPipeline(**load_pipeline("tiny", device="cpu").components)
    pipe.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with atedm.pruned(pipe, "paper"), atedm.recorded(pipe) as recording:
        pipe("a red ring", image=start, strength=0.4, num_inference_steps=10, generator=torch.manual_seed(0))
    assert recording.evaluations == 4
    assert recording.kept_share == pytest.approx(0.375, abs=0.01)  # the early steps of the schedule are never reached


def test_training_goes_on_from_the_shipped_weights(tmp_path: Path) -> None:
    import typer

    from atedm.tiny.train import train

    app = typer.Typer()
    app.command()(train)
    sitting = [str(tmp_path), "--minutes", "0.01", "--canvas", "64", "--batch", "2", "--scenes", "8", "--eager"]
    shipped = ["--start-from", str(weights_folder()), "--lr", "1e-9"]
    assert CliRunner().invoke(app, sitting + shipped, catch_exceptions=False).exit_code == 0
    moved = pipeline_from_run(tmp_path).unet.state_dict()
    for name, weight in load_pipeline("tiny", device="cpu").unet.state_dict().items():
        torch.testing.assert_close(moved[name], weight, rtol=0, atol=1e-4)


def test_the_recipe_trains_resumes_and_assembles(tmp_path: Path) -> None:
    """Every stage of training runs for some seconds and its result opens; only the length differs from the real one."""
    import typer

    from atedm.tiny.train import train

    run = tmp_path / "run"
    build_tokenizer(run / "tokenizer")
    lines: list[str] = []
    train_autoencoder(1.0, batch=4, scenes=32, report=lines.append).save_pretrained(run / "vae")
    assert "scaling factor" in lines[-1]
    app = typer.Typer()
    app.command()(train)
    sitting = [str(run), "--minutes", "0.02", "--canvas", "64", "--batch", "2", "--scenes", "8", "--eager"]
    seen = []
    for _ in range(2):
        result = CliRunner().invoke(app, sitting, catch_exceptions=False)
        assert result.exit_code == 0
        seen.append(int(load_file(run / "state.safetensors")["seen"]))
    assert 0 < seen[0] < seen[1]
    image = pipeline_from_run(run)("a red ring", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert np.isfinite(image).all()
