"""Turn a training run into the folder that ships: an ordinary diffusers pipeline with half-precision weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from atedm.tiny.classifier import save_classifier, train_classifier
from atedm.tiny.text import build_text_encoders
from atedm.tiny.training_state import averaged_weights, part_of
from atedm.tiny.unet import build_scheduler, build_unet


def pipeline_from_run(run: Path) -> StableDiffusionXLPipeline:
    """Open the averaged weights of a training run as a float32 pipeline."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    parts = dict(zip(("text_encoder", "text_encoder_2"), build_text_encoders(tokenizer), strict=True))
    parts["unet"] = build_unet()
    averaged = averaged_weights(run)
    for name, part in parts.items():
        part.load_state_dict(part_of(averaged, name))
    return StableDiffusionXLPipeline(
        vae=AutoencoderTiny.from_pretrained(run / "vae"),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        **parts,
    )


def save_half(pipe: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write the pipeline with float16 weights that open as float32 unless a dtype is asked for."""
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for part in ("text_encoder", "text_encoder_2"):
        _edit_config(folder / part, set_to={"dtype": "float32"}, drop=("torch_dtype", "_name_or_path"))
    # AutoencoderTiny writes block_out_channels itself and then warns of it when it is read back.
    _edit_config(folder / "vae", drop=("block_out_channels", "_name_or_path"))
    _edit_config(folder / "unet", drop=("_name_or_path",))


def _edit_config(part: Path, set_to: dict[str, Any] | None = None, drop: tuple[str, ...] = ()) -> None:
    file = part / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(config | (set_to or {}), indent=2, sort_keys=True) + "\n")


def assemble(
    run: Annotated[Path, typer.Argument(help="Folder of the training run.")],
    folder: Annotated[Path, typer.Argument(help="Where the pipeline and its judge go.")],
    classifier_minutes: Annotated[float, typer.Option(help="Training time of the judge, if there is none yet.")] = 5,
) -> None:
    """Write the pipeline of a run, and train the judge of its pictures if ``run`` has none."""
    pipe = pipeline_from_run(run)
    judge = run / "classifier.safetensors"
    if not judge.exists():
        vae = pipe.vae

        def rebuild(images: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(images * 2 - 1).latents
                rebuilt: torch.Tensor = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample
            return (rebuilt.float() / 2 + 0.5).clamp(0, 1)

        save_classifier(train_classifier(60 * classifier_minutes, rebuild=rebuild), judge)
    folder.mkdir(parents=True, exist_ok=True)
    for tokenizer in ("tokenizer", "tokenizer_2"):  # older transformers read these two, newer ones tokenizer.json
        (folder / tokenizer).mkdir(exist_ok=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(run / "tokenizer" / name, folder / tokenizer / name)
    (folder / "classifier.safetensors").write_bytes(judge.read_bytes())
    save_half(pipe, folder)


if __name__ == "__main__":
    typer.run(assemble)
