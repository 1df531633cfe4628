"""Open the model to work on: the one that ships, a local folder or file, or one from the Hugging Face hub."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atedm.choices import draws_in_few_steps

TINY = "tiny"
"""Name of the model that ships with the package."""


@dataclass(frozen=True)
class Habits:
    """What suits a model where the user leaves it open."""

    guidance: float
    steps: int
    preset: str
    prompts: tuple[str, ...]


_PICTURES = (
    "a red fox sitting in fresh snow, morning light",
    "a bowl of ramen with a soft boiled egg, top view",
    "an old lighthouse on a cliff in a storm, oil painting",
    "three birds walking around a dry grass field",
)
_SCENES = (
    "a red circle above a blue square on a checkered lavender background",
    "a yellow triangle left of a black ring on a striped cyan background",
    "a white cross right of a purple circle on a plain brown background",
    "a green square below an orange triangle on a striped gray background",
)


def habits(model: str) -> Habits:
    """Return the guidance, steps, preset and prompts that suit ``model`` by its name."""
    if model == TINY:
        # Its second level does not bear the paper's ranking: docs/ablation.md has the figures.
        return Habits(guidance=3.0, steps=50, preset="dagger", prompts=tuple(s.replace("plain ", "") for s in _SCENES))
    if draws_in_few_steps(model):
        return Habits(guidance=0.0, steps=4, preset="turbo", prompts=_PICTURES)
    return Habits(guidance=7.0, steps=50, preset="paper", prompts=_PICTURES)


def tiny_folder() -> Path:
    """Return the folder of the model that ships: an ordinary diffusers pipeline.

    Raises:
        FileNotFoundError: If this installation carries no weights.
    """
    folder = Path(__file__).parent / "tiny" / "weights"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"the shipped model is missing from this installation: no {folder / 'model_index.json'}"
        )
    return folder


def usual_dtype(device: str | torch.device) -> torch.dtype:
    """Return float32 for the CPU and float16 for all else."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def load_pipeline(model: str = TINY, *, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Open a text-to-image pipeline.

    Args:
        model: "tiny" for the model that ships, a diffusers folder, a single ``.safetensors`` file, or a hub id such as
            "stabilityai/stable-diffusion-xl-base-1.0".
        device: Where to put it; by default CUDA, else MPS, else the CPU.
        dtype: By default float32 on the CPU and float16 elsewhere.

    Returns:
        The pipeline, its own progress bar off.

    Raises:
        FileNotFoundError: If a local folder or file is not there.
        ValueError: If it is not something diffusers can open, the hub cannot be reached, or as `check_device`.
    """
    device = best_device() if device is None else device
    check_device(device)
    dtype = dtype or usual_dtype(device)
    with warnings.catch_warnings():
        # The newest diffusers calls torch_dtype old, the oldest knows no other name for it.
        warnings.simplefilter("ignore", FutureWarning)
        pipe = _open(model, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _open(model: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoPipelineForText2Image, StableDiffusionXLPipeline

    if not model.strip():
        raise ValueError("the name of the model is empty; give 'tiny', a folder, a .safetensors file or a hub id")
    if model.startswith("~"):
        model = str(Path(model).expanduser())
    if model == TINY:
        return StableDiffusionXLPipeline.from_pretrained(tiny_folder(), torch_dtype=dtype)
    if model.endswith((".safetensors", ".ckpt")):
        return _from_file(Path(model), dtype)
    if (Path(model) / "model_index.json").exists() or not _looks_local(model):
        try:
            return AutoPipelineForText2Image.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
        except Exception as error:  # whatever the libraries come upon in files that are broken
            found = "; ".join(_broken_files(Path(model))) or _first_line(error)
            raise ValueError(f"cannot open the model {model!r}: {found}") from error
    if Path(model).exists():
        raise ValueError(f"{model} is no diffusers pipeline: it has no model_index.json")
    raise FileNotFoundError(f"no model at {model!r}; give 'tiny', a folder, a .safetensors file or a hub id")


def native_size(pipe: Any) -> tuple[int, int]:
    """(width, height) in pixels of the images that a pipeline makes where none is asked for."""
    side = pipe.unet.config.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def quiet_libraries() -> None:
    """Keep progress bars and notes of other libraries out of the terminal; warnings that matter still raise."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def best_device() -> str:
    """Return "cuda", "mps" or "cpu", whichever is the fastest there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> None:
    """See that torch knows a device and that it is there.

    Raises:
        ValueError: If not; the message says what is.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; give cuda, mps or cpu") from error
    is_there = True
    if device.type == "cuda":
        is_there = (device.index or 0) < torch.cuda.device_count()
    elif device.type == "mps":
        is_there = torch.backends.mps.is_available()
    elif device.type != "cpu":
        backend = getattr(torch, device.type, None)  # such as torch.xpu; there is none for "meta"
        is_there = backend is not None and backend.is_available()
    if not is_there:
        raise ValueError(f"there is no device {name!r} here; the fastest there is, {best_device()!r}, is the default")


def _from_file(file: Path, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        raise ValueError(f"{file.name} may run code when it is opened; convert it to .safetensors first")
    if not file.exists():
        raise FileNotFoundError(f"no model file at {str(file)!r}")
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
    except Exception as error:
        raise ValueError(f"cannot open {file}: {_first_line(error)}") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"{file} holds no U-Net as shared checkpoints do, but {', '.join(sorted(names)[:2]) or 'nothing'}; "
            "a LoRA or a single part of a model cannot be opened alone"
        )
    two_encoders = any(name.startswith("conditioner.embedders.1.") for name in names)
    kind = StableDiffusionXLPipeline if two_encoders else StableDiffusionPipeline
    try:
        return kind.from_single_file(str(file), torch_dtype=dtype)
    except OSError as error:
        base = (
            "stabilityai/stable-diffusion-xl-base-1.0"
            if two_encoders
            else "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
        raise ValueError(
            f"cannot open {file}: {_first_line(error)} (diffusers reads the configuration of such a file from the hub, "
            f"as a rule that of {base}, once; after that its cache will do)"
        ) from error
    except Exception as error:
        raise ValueError(f"cannot open {file}: {_first_line(error)}") from error


def _broken_files(folder: Path) -> list[str]:
    """Say of each file of a pipeline that cannot be read what is wrong with it: libraries tell what, but not where."""
    from safetensors import safe_open

    found = []
    for file in sorted(folder.rglob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
        except Exception as error:
            found.append(f"{file.relative_to(folder)} is broken ({_first_line(error)})")
    return found


def _looks_local(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or Path(model).exists()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
