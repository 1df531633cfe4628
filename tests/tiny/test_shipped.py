"""The model that ships: opens as an ordinary pipeline, fits the wheel, draws what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import SD3Transformer2DModel, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor
from typer.testing import CliRunner

import atedm
from atedm.app.models import load_pipeline
from atedm.tiny import objects_of, weights_folder
from atedm.tiny.few_steps import LORA
from atedm.tiny.judge import JUDGE, accuracy, judge, load_judge
from atedm.tiny.pipeline import open_run
from atedm.tiny.scenes import Scene, held_out_scenes
from atedm.tiny.train import train
from painted_objects import keep_discs
from rendered_scenes import rendered_scenes


def test_it_is_small_and_holds_safetensors_only() -> None:
    files = [file for file in weights_folder().rglob("*") if file.is_file()]
    model = [file for file in files if LORA not in file.parts]
    assert sum(file.stat().st_size for file in model) < 25e6
    assert sum(file.stat().st_size for file in files) < 29e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}


def test_the_transformer_is_smaller_and_has_the_licence_of_its_objects() -> None:
    files = [file for file in weights_folder("tiny-sd3").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if LORA not in file.parts) < 12e6
    assert sum(file.stat().st_size for file in files) < 14e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}
    assert any(file.name == "NOTICE.txt" for file in files)


def test_the_transformer_is_sd3_shaped() -> None:
    pipe = load_pipeline("tiny-sd3", device="cpu")
    assert isinstance(pipe.transformer, SD3Transformer2DModel)
    assert [(shape.tokens, shape.place.layers) for shape in atedm.apply(pipe).shapes] == [(256, 7)]


def test_it_opens_with_plain_diffusers_and_is_sdxl_shaped() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(weights_folder())
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    config = pipe.unet.config
    assert config.addition_embed_type == "text_time"
    assert config.use_linear_projection
    assert list(config.down_block_types) == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    tokens = {shape.place.level: shape.tokens for shape in atedm.apply(pipe).shapes}
    assert tokens == {2: 1024, 3: 256}


@pytest.mark.parametrize("word", ["butterfly", "engine", "meadow", "background", "front"])
def test_every_word_of_the_captions_is_one_token(word: str) -> None:
    tokenizer = StableDiffusionXLPipeline.from_pretrained(weights_folder()).tokenizer
    assert len(tokenizer.tokenize(word)) == 1
    assert len(tokenizer.tokenize("a spectroscope")) > 2


def test_the_judge_reads_rendered_scenes_and_says_where_objects_are() -> None:
    scenes, images = rendered_scenes()
    reader = load_judge(weights_folder() / JUDGE)
    shares = accuracy([judge(asked, seen) for asked, seen in zip(scenes, reader.read(images), strict=True)])
    assert shares["object"] >= 0.95, shares
    assert min(shares.values()) >= 0.85, shares
    # On a plain background an object is what has another colour than the picture's edges at that height.
    plain = [i for i, scene in enumerate(scenes) if scene.background in ("pink", "blue", "yellow", "gray")]
    maps = reader.object_maps(images[plain])
    differs = (images[plain] - images[plain][..., :4].mean(-1, keepdim=True)).abs().amax(1) > 0.25
    painted = torch.nn.functional.adaptive_avg_pool2d(differs.float(), maps.shape[-2:])
    overlap = ((maps > 0.5) & (painted > 0.5)).sum() / ((maps > 0.5) | (painted > 0.5)).sum()
    assert overlap > 0.6


def drawn(pipe: Any, scenes: list[Scene], steps: int, batch: int = 8, guidance: float = 3.0) -> Tensor:
    """(N, 3, 256, 256) in [0, 1]; image i has the noise of seed i, however it is batched."""
    parts = []
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        images = pipe(
            [scene.caption for scene in some],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(some))],
            output_type="pt",
        ).images
        parts.append(images)
    return torch.cat(parts)


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    return (-10 * (images - reference).square().flatten(1).mean(1).log10()).tolist()


def test_it_draws_what_held_out_captions_say_dense_and_pruned() -> None:
    pipe = load_pipeline("tiny", device="cpu")
    reader = load_judge(weights_folder() / JUDGE)
    scenes = held_out_scenes(6, seed=1)
    dense = drawn(pipe, scenes, 6)
    shares = accuracy([judge(asked, seen) for asked, seen in zip(scenes, reader.read(dense), strict=True)])
    del shares["all"]
    assert min(shares.values()) >= 0.85, shares
    with atedm.pruned(pipe, "matched"):
        pruned = drawn(pipe, scenes, 6)
    assert 20 < float(np.mean(psnr(pruned, dense))) < 60
    right = [judge(asked, seen).all_right for asked, seen in zip(scenes, reader.read(pruned), strict=False)]
    assert sum(right) >= 4


def test_its_sibling_draws_in_four_steps_dense_and_pruned() -> None:
    pipe = load_pipeline("tiny-turbo", device="cpu")
    reader = load_judge(weights_folder() / JUDGE)
    scenes = held_out_scenes(8, seed=1)
    dense = drawn(pipe, scenes, 4, guidance=0.0)
    with atedm.pruned(pipe, "matched"):
        pruned = drawn(pipe, scenes, 4, guidance=0.0)
    for images in (dense, pruned):
        shares = accuracy([judge(asked, seen) for asked, seen in zip(scenes, reader.read(images), strict=True)])
        assert shares["object"] >= 0.8, shares
    assert 18 < float(np.mean(psnr(pruned, dense))) < 60


@pytest.mark.parametrize(("name", "steps", "guidance"), [("tiny-sd3", 6, 3.0), ("tiny-sd3-turbo", 4, 0.0)])
def test_the_transformers_draw_what_held_out_captions_say_dense_and_pruned(
    name: str, steps: int, guidance: float
) -> None:
    pipe = load_pipeline(name, device="cpu")
    reader = load_judge(weights_folder() / JUDGE)
    scenes = held_out_scenes(8, seed=1, names=objects_of(name))
    dense = drawn(pipe, scenes, steps, guidance=guidance)
    with atedm.pruned(pipe, "matched"):
        pruned = drawn(pipe, scenes, steps, guidance=guidance)
    for images in (dense, pruned):
        shares = accuracy([judge(asked, seen) for asked, seen in zip(scenes, reader.read(images), strict=True)])
        assert shares["object"] >= 0.6, shares
        assert shares["background"] >= 0.8, shares
    assert 15 < float(np.mean(psnr(pruned, dense))) < 60


def test_images_do_not_depend_on_how_they_are_batched() -> None:
    pipe = load_pipeline("tiny", device="cpu")
    scenes = held_out_scenes(3, seed=2)
    with atedm.pruned(pipe, "dagger"):
        one, three = (drawn(pipe, scenes, 4, batch, guidance=0.0) for batch in (1, 3))
    assert min(psnr(one, three)) > 40


def test_image_to_image_runs_on_the_same_parts() -> None:
    pipe = StableDiffusionXLImg2ImgPipeline(**load_pipeline("tiny", device="cpu").components)
    pipe.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with atedm.pruned(pipe, "paper"), atedm.recorded(pipe) as recording:
        pipe("a rose", image=start, strength=0.4, num_inference_steps=10, generator=torch.manual_seed(0))
    assert recording.evaluations == 4
    assert recording.kept_share == pytest.approx(0.375, abs=0.01)  # the early steps of the schedule are never reached


def test_training_goes_on_from_the_shipped_weights(tmp_path: Path) -> None:
    keep_discs(tmp_path / "objects")
    app = typer.Typer()
    app.command()(train)
    sitting = "--images 2 --canvas 64 --batch 2 --pool 32 --lr 1e-9 --sample-minutes 0 --eager --start-from"
    arguments = [str(tmp_path), *sitting.split(), str(weights_folder())]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    moved = open_run(tmp_path).unet.state_dict()
    for name, weight in load_pipeline("tiny", device="cpu").unet.state_dict().items():
        torch.testing.assert_close(moved[name], weight, rtol=0, atol=1e-4)
