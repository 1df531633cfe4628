"""A model from a stranger: nothing of it is run, and nothing but safetensors and JSON is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from atedm.app.models import load_pipeline
from atedm.tiny import weights_folder
from faults import ended, in_child

SOURCES = Path(__file__).parents[2] / "src"


class Runs:
    """Pickled, it makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(weights_folder(), tmp_path / "model"))


def opened_in_a_child(folder: Path, before: Callable[[], None] = lambda: None) -> bool:
    """Try to open the model in a child, which takes along what it imports; return whether that worked."""

    def work() -> None:
        before()
        os.chdir(folder)
        load_pipeline(str(folder), device="cpu")

    return ended(in_child(work)) == 0


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_not_read(model: Path, tmp_path: Path, part: str) -> None:
    safe = next((model / part).glob("*.safetensors"))
    pickled = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}[safe.stem]
    content = load_file(safe) | {"payload": Runs(tmp_path / "trace")}
    safe.unlink()
    torch.save(content, model / part / pickled)
    with pytest.raises(ValueError, match="cannot open the model"):
        load_pipeline(str(model), device="cpu")
    assert not (tmp_path / "trace").exists()


CODE = """
from pathlib import Path
Path({trace!r}).touch()
from diffusers import StableDiffusionXLPipeline as {name}
from diffusers import UNet2DConditionModel as {unet}
"""


def test_code_that_a_model_brings_is_not_run(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    index = json.loads((model / "model_index.json").read_text())
    code = CODE.format(trace=str(trace), name="Mine", unet="MyUNet")
    for change, file in (
        ({"_class_name": ["mine", "Mine"]}, model / "mine.py"),
        ({"_class_name": "Mine"}, model / "pipeline.py"),
        ({"unet": ["mine", "MyUNet"]}, model / "unet" / "mine.py"),
        ({"unet": ["model", "MyUNet"]}, model / "model.py"),
    ):
        file.write_text(code)
        (model / "model_index.json").write_text(json.dumps(index | change))
        assert not opened_in_a_child(model), change
        assert not trace.exists(), change
        file.unlink()


def test_an_attention_that_a_config_names_is_not_fetched(model: Path, tmp_path: Path) -> None:
    """What transformers 4.56 to 5.2 did (CVE-2026-4372), which is why they are not among what is required."""
    file, trace = model / "text_encoder" / "config.json", tmp_path / "fetched"

    def watched() -> None:
        def fetch(*_: Any, **__: Any) -> None:
            trace.touch()
            raise OSError("there is no network")

        huggingface_hub.snapshot_download = huggingface_hub.hf_hub_download = fetch

    plain = json.loads(file.read_text())
    for name in ("_attn_implementation_internal", "_attn_implementation", "attn_implementation"):
        file.write_text(json.dumps(plain | {name: "stranger/kernel"}))
        opened_in_a_child(model, watched)
        assert not trace.exists(), name


def test_nothing_in_the_package_unpickles_or_trusts_code() -> None:
    for file in SOURCES.rglob("*.py"):
        for word in (
            "torch.load(",
            "pickle.load",
            "trust_remote_code",
            "yaml.load(",
            "allow_pickle=True",
            "eval(compile",
        ):
            assert word not in file.read_text(), f"{file}: {word}"
