"""Open the model to work on: the one that ships, a local folder or file, or one from the Hugging Face hub."""

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from atedm.app.devices import best_device, check_device, usual_dtype
from atedm.costs.architectures import architecture
from atedm.tiny import SHIPPED, TINY
from atedm.tiny.shipped import open_shipped

_WHAT_WORKS = f"give {', '.join(map(repr, SHIPPED))}, a folder, a .safetensors file or a hub id"


def load_pipeline(model: str = TINY, *, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Open a text-to-image pipeline.

    Args:
        model: "tiny" for the small SDXL that ships, "tiny-sd3" for the small SD3, "tiny-turbo" and "tiny-sd3-turbo" for
            their siblings that draw in 4 steps; a diffusers folder, a single ``.safetensors`` file, or a hub id such as
            "stabilityai/stable-diffusion-xl-base-1.0".
        device: Where to put it. By default CUDA, else MPS, else the CPU.
        dtype: By default float32 on the CPU and float16 elsewhere.

    Returns:
        The pipeline, with its own progress bar off.

    Raises:
        FileNotFoundError: If a local folder or file does not exist.
        ValueError: If diffusers cannot open it, the hub cannot be reached, or the device is not there.
    """
    device = best_device() if device is None else device
    check_device(device)
    dtype = dtype or usual_dtype(device)
    with warnings.catch_warnings():
        # The newest diffusers calls torch_dtype old, and the oldest knows no other name for it.
        warnings.simplefilter("ignore", FutureWarning)
        pipe = _open(model, dtype)
    if lacking := _without_weights(pipe):
        raise ValueError(f"cannot open the model {model!r}: its files hold no weights for {lacking}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def native_size(pipe: Any) -> tuple[int, int]:
    """Return (width, height) in pixels of the images that a pipeline makes by default."""
    return architecture(pipe).default_size


def quiet_libraries() -> None:
    """Turn off progress bars and notes of other libraries. What goes wrong still raises."""
    import transformers.utils.logging  # slow to import

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _open(model: str, dtype: torch.dtype) -> Any:
    if not model.strip():
        raise ValueError(f"the name of the model is empty; {_WHAT_WORKS}")
    if model in SHIPPED:
        return open_shipped(model, dtype)
    if model.startswith("~"):
        model = str(Path(model).expanduser())
    if model.endswith((".safetensors", ".ckpt")):
        return _from_file(Path(model), dtype)
    looks_local = model.startswith((".", "/")) or model.count("/") != 1 or Path(model).exists()
    if (Path(model) / "model_index.json").exists() or not looks_local:
        try:
            return diffusers.AutoPipelineForText2Image.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
        except Exception as error:  # the libraries raise many kinds for broken files
            found = "; ".join(_broken_files(Path(model))) or _first_line(error)
            raise ValueError(f"cannot open the model {model!r}: {found}") from error
    if Path(model).exists():
        raise ValueError(f"{model} is no diffusers pipeline: it has no model_index.json")
    raise FileNotFoundError(f"no model at {model!r}; {_WHAT_WORKS}")


def _from_file(file: Path, dtype: torch.dtype) -> Any:
    """Open a checkpoint of one file; the names of its tensors say whether it is SDXL or SD 1.x."""
    if file.suffix != ".safetensors":
        raise ValueError(f"{file.name} may run code when it is opened; convert it to .safetensors first")
    if not file.exists():
        raise FileNotFoundError(f"no model file at {str(file)!r}")
    names = _tensor_names(file)
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"{file} holds no U-Net as shared checkpoints do, but {', '.join(sorted(names)[:2]) or 'nothing'}; "
            "a LoRA or a single part of a model cannot be opened alone"
        )
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        kind, base = diffusers.StableDiffusionXLPipeline, "stabilityai/stable-diffusion-xl-base-1.0"
    else:
        kind, base = diffusers.StableDiffusionPipeline, "stable-diffusion-v1-5/stable-diffusion-v1-5"
    try:
        return kind.from_single_file(str(file), torch_dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"cannot open {file}: {_first_line(error)} (diffusers reads the configuration of such a file from the hub, "
            f"as a rule that of {base}, once; after that its cache will do)"
        ) from error
    except Exception as error:
        raise ValueError(f"cannot open {file}: {_first_line(error)}") from error


def _without_weights(pipe: Any) -> str | None:
    """Name a weight that the configuration asks for and no file holds, if there is one."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for weight, tensor in part.named_parameters():
                if tensor.is_meta:
                    return f"{name}, {weight}"
    return None


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except Exception as error:
        raise ValueError(f"cannot open {file}: {_first_line(error)}") from error


def _broken_files(folder: Path) -> list[str]:
    """Say which files of a pipeline cannot be read, and why: libraries say why, but not which."""
    found = []
    for file in sorted(folder.rglob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                _tensor_names(file)
        except Exception as error:
            reason = _first_line(error.__cause__ or error)
            found.append(f"{file.relative_to(folder)} is broken ({reason})")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
