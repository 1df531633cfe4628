"""Turn a training run into the folder that ships: an ordinary diffusers pipeline with half-precision weights.

python -m atedm.tiny.assemble RUN FOLDER
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from diffusers import DiffusionPipeline

from atedm.tiny.distill import FOLDER as LORA
from atedm.tiny.distill import build_few_step_scheduler
from atedm.tiny.judge import JUDGE
from atedm.tiny.pipeline import open_run, save_half
from atedm.tiny.train_clip import CLIP


def with_few_steps(pipe: DiffusionPipeline, lora: Path) -> DiffusionPipeline:
    """Make a pipeline its few-step sibling: the LoRA in ``lora``, and the sampler that goes with it."""
    pipe.load_lora_weights(lora)
    pipe.scheduler = build_few_step_scheduler(transformer=hasattr(pipe, "transformer"))
    return pipe


def assemble(
    run: Annotated[Path, typer.Argument(help="Folder of the training run.")],
    folder: Annotated[Path, typer.Argument(help="Where it goes, with judge, CLIP model and LoRA.")],
) -> None:
    """Write the pipeline of a run, and beside it the judge, the CLIP model and the few-step LoRA."""
    save_half(open_run(run), run, folder)
    if (run / JUDGE).exists():
        shutil.copyfile(run / JUDGE, folder / JUDGE)
    for part in (CLIP, LORA):
        if (run / part).exists():
            shutil.copytree(run / part, folder / part, dirs_exist_ok=True)


if __name__ == "__main__":
    typer.run(assemble)
