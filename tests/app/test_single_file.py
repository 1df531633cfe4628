"""Checkpoints of one file, as community sites share them, opened with no network but with the hub's cache."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from atedm.app.models import load_pipeline
from faults import Before, command, ended, in_child
from models import draw
from single_file import save_as_single_file
from support import sd1_of_one_file_parts, sdxl_of_one_file_parts

SDXL, SD1 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"


def cache_configuration(pipe: Any, hub: Path, name: str) -> None:
    """Put a pipeline's configuration where the hub's client keeps what it has fetched before."""
    repository = hub / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    pipe.save_pretrained(snapshot)
    for weights in snapshot.rglob("*.safetensors"):
        weights.unlink()


def offline(hub: Path) -> Before:
    """There is no network, and what was fetched before is in ``hub``."""

    def before() -> None:
        huggingface_hub.constants.HF_HUB_CACHE = str(hub)
        huggingface_hub.constants.HF_HUB_OFFLINE = True

    return before


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A pipeline, its file and a hub's cache that knows its configuration."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = sdxl_of_one_file_parts()
    save_as_single_file(pipe, folder / "mix.safetensors")
    cache_configuration(pipe, folder / "hub", SDXL)
    return pipe, folder / "mix.safetensors", folder / "hub"


@pytest.mark.parametrize("parts", [sdxl_of_one_file_parts, sd1_of_one_file_parts])
def test_diffusers_reads_back_every_weight(parts: Any, tmp_path: Path) -> None:
    pipe = parts()
    save_as_single_file(pipe, tmp_path / "model.safetensors")
    pipe.save_pretrained(tmp_path / "configuration")
    read = type(pipe).from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "configuration")
    )  # fmt: skip
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            again = read.components[name].state_dict()
            assert again.keys() == part.state_dict().keys()
            assert all(torch.equal(value, again[key]) for key, value in part.state_dict().items()), name
    read.set_progress_bar_config(disable=True)
    assert torch.equal(draw(read), draw(pipe))


@pytest.mark.parametrize(("parts", "name"), [(sdxl_of_one_file_parts, SDXL), (sd1_of_one_file_parts, SD1)])
def test_the_kind_is_told_by_the_file(parts: Any, name: str, tmp_path: Path) -> None:
    pipe = parts()
    save_as_single_file(pipe, tmp_path / "mix.safetensors")
    cache_configuration(pipe, tmp_path / "hub", name)

    def work() -> None:
        offline(tmp_path / "hub")()
        opened = load_pipeline(str(tmp_path / "mix.safetensors"), device="cpu")
        assert type(opened) is type(pipe)
        torch.save(draw(opened), tmp_path / "latents.pt")

    assert ended(in_child(work)) == 0
    assert torch.equal(torch.load(tmp_path / "latents.pt"), draw(pipe))


def test_the_command_line_draws_with_it(sdxl: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, file, hub = sdxl
    done = command(
        "generate", "a duck", "--model", file, "--steps", "2", "--size", "64x64", "--device", "cpu",
        "--out", tmp_path / "out", folder=tmp_path, before=offline(hub),
    )  # fmt: skip
    assert done.status == 0, done.err
    assert list((tmp_path / "out").rglob("*.png"))


def test_what_is_wrong_is_told_in_one_line(sdxl: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, file, hub = sdxl
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot open .*truncated\.safetensors"):
        load_pipeline(str(truncated))
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block.lora_up.weight": torch.zeros(2, 2)}, lora)
    with pytest.raises(ValueError, match=r"lora\.safetensors holds no U-Net"):
        load_pipeline(str(lora))
    no_words = tmp_path / "no-words.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "conditioner.embedders.0" not in key}, no_words)
    for wrong, said in ((no_words, "CLIP"), (file, SDXL)):
        there = hub if wrong is no_words else tmp_path / "empty"
        done = command(
            "generate", "x", "--model", wrong, "--device", "cpu", "--out", "o", folder=tmp_path, before=offline(there)
        )
        assert done.in_one_line, done.err
        assert said in done.err, done.err
