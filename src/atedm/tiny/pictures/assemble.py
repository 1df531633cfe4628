"""Turn a training run into the folder that ships: an ordinary diffusers pipeline with half-precision weights.

python -m atedm.tiny.pictures.assemble RUN FOLDER
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from atedm.tiny.pictures.checkpoint import averaged_weights, denoiser_of
from atedm.tiny.pictures.distill import FOLDER as LORA
from atedm.tiny.pictures.distill import build_few_step_scheduler
from atedm.tiny.pictures.pipeline import open_run, open_transformer_run, save_half
from atedm.tiny.pictures.text import build_text_encoders
from atedm.tiny.pictures.train_judge import JUDGE
from atedm.tiny.pictures.unet import build_unet


def pipeline_from_run(run: Path) -> StableDiffusionXLPipeline:
    """Open the averaged weights of a training run as a float32 pipeline."""
    return open_run(run, build_text_encoders, build_unet())


def with_few_steps(pipe: DiffusionPipeline, lora: Path) -> DiffusionPipeline:
    """Make a pipeline its few-step sibling: the LoRA in ``lora``, and the sampler that goes with it."""
    pipe.load_lora_weights(lora)
    pipe.scheduler = build_few_step_scheduler(transformer=hasattr(pipe, "transformer"))
    return pipe


def assemble(
    run: Annotated[Path, typer.Argument(help="Folder of the training run.")],
    folder: Annotated[Path, typer.Argument(help="Where the pipeline goes, with its judge and LoRA if there are any.")],
) -> None:
    """Write the pipeline of a run, and beside it the judge and the few-step LoRA."""
    is_transformer = denoiser_of(averaged_weights(run)) == "transformer"
    save_half(open_transformer_run(run) if is_transformer else pipeline_from_run(run), run, folder)
    if (run / JUDGE).exists():
        shutil.copyfile(run / JUDGE, folder / JUDGE)
    if (run / LORA).exists():
        shutil.copytree(run / LORA, folder / LORA, dirs_exist_ok=True)


if __name__ == "__main__":
    typer.run(assemble)
