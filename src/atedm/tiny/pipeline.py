"""A training run as an ordinary diffusers pipeline, and the folder of half-precision weights that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from atedm.tiny.checkpoint import averaged_weights, denoiser_of, part_of
from atedm.tiny.models import TRANSFORMER
from atedm.tiny.text import build_text_encoders
from atedm.tiny.transformer import (
    CaptionOnlySD3Pipeline,
    build_flow_scheduler,
    build_transformer,
    with_projection,
)
from atedm.tiny.unet import build_scheduler, build_unet


def open_run(run: Path) -> DiffusionPipeline:
    """Open the averaged weights of a training run, of either class, as a float32 pipeline."""
    weights = averaged_weights(run)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    first, second = build_text_encoders(tokenizer)
    shared = {
        "vae": AutoencoderTiny.from_pretrained(run / "vae"),
        "tokenizer": tokenizer,
        "tokenizer_2": CLIPTokenizer.from_pretrained(run / "tokenizer"),
    }
    if denoiser_of(weights) == TRANSFORMER:
        parts = _with(weights, text_encoder=first, text_encoder_2=second, transformer=build_transformer())
        return CaptionOnlySD3Pipeline(
            **shared | parts | {"text_encoder": with_projection(first)},
            text_encoder_3=None,
            tokenizer_3=None,
            scheduler=build_flow_scheduler(),
        )
    return StableDiffusionXLPipeline(
        **shared | _with(weights, text_encoder=first, text_encoder_2=second, unet=build_unet()),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _with(weights: dict[str, Tensor], **parts: Any) -> dict[str, Any]:
    """Give untrained parts of a pipeline, by their names in it, the weights of a run."""
    for name, part in parts.items():
        part.load_state_dict(part_of(weights, name))
        part.eval()
    return parts


def save_half(pipe: DiffusionPipeline, run: Path, folder: Path) -> None:
    """Write the pipeline of a run with float16 weights that open as float32 unless a dtype is asked for."""
    for tokenizer in ("tokenizer", "tokenizer_2"):  # older transformers read these two, newer ones tokenizer.json
        (folder / tokenizer).mkdir(parents=True, exist_ok=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(run / "tokenizer" / name, folder / tokenizer / name)
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for part in ("text_encoder", "text_encoder_2"):
        _edit_config(folder / part, set_to={"dtype": "float32"}, drop=("torch_dtype", "_name_or_path"))
    # AutoencoderTiny writes block_out_channels itself and then warns of it when it is read back.
    _edit_config(folder / "vae", drop=("block_out_channels", "_name_or_path"))
    _edit_config(folder / ("unet" if hasattr(pipe, "unet") else "transformer"), drop=("_name_or_path",))


def _edit_config(part: Path, set_to: dict[str, Any] | None = None, drop: tuple[str, ...] = ()) -> None:
    file = part / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(config | (set_to or {}), indent=2, sort_keys=True) + "\n")
