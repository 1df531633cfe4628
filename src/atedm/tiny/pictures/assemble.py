"""Turn a training run into the folder that ships: an ordinary diffusers pipeline with half-precision weights.

python -m atedm.tiny.pictures.assemble RUN FOLDER
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from atedm.tiny.pictures.checkpoint import averaged_weights, part_of
from atedm.tiny.pictures.distill import FOLDER as LORA
from atedm.tiny.pictures.distill import build_lcm_scheduler
from atedm.tiny.pictures.text import build_text_encoders
from atedm.tiny.pictures.train_judge import JUDGE
from atedm.tiny.pictures.unet import build_scheduler, build_unet


def pipeline_from_run(run: Path) -> StableDiffusionXLPipeline:
    """Open the averaged weights of a training run as a float32 pipeline."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    parts = dict(zip(("text_encoder", "text_encoder_2"), build_text_encoders(tokenizer), strict=True))
    parts["unet"] = build_unet()
    averaged = averaged_weights(run)
    for name, part in parts.items():
        part.load_state_dict(part_of(averaged, name))
        part.eval()
    return StableDiffusionXLPipeline(
        vae=AutoencoderTiny.from_pretrained(run / "vae"),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        **parts,
    )


def with_few_steps(pipe: StableDiffusionXLPipeline, lora: Path) -> StableDiffusionXLPipeline:
    """Make a pipeline its few-step sibling: the LoRA in ``lora``, and the sampler that goes with it."""
    pipe.load_lora_weights(lora)
    pipe.scheduler = build_lcm_scheduler()
    return pipe


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
    folder: Annotated[Path, typer.Argument(help="Where the pipeline goes, with its judge and LoRA if there are any.")],
) -> None:
    """Write the pipeline of a run, and beside it the judge and the few-step LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    for tokenizer in ("tokenizer", "tokenizer_2"):  # older transformers read these two, newer ones tokenizer.json
        (folder / tokenizer).mkdir(exist_ok=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(run / "tokenizer" / name, folder / tokenizer / name)
    if (run / JUDGE).exists():
        shutil.copyfile(run / JUDGE, folder / JUDGE)
    if (run / LORA).exists():
        shutil.copytree(run / LORA, folder / LORA, dirs_exist_ok=True)
    save_half(pipeline_from_run(run), folder)


if __name__ == "__main__":
    typer.run(assemble)
