"""Turn a training run into the folder that ships: an ordinary diffusers pipeline with half-precision weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from diffusers import StableDiffusionXLPipeline

from atedm.tiny.classifier import save_classifier, train_classifier
from atedm.tiny.pictures.autoencoder import rebuilt
from atedm.tiny.pictures.pipeline import open_run, save_half
from atedm.tiny.text import build_text_encoders
from atedm.tiny.unet import build_unet


def pipeline_from_run(run: Path) -> StableDiffusionXLPipeline:
    """Open the averaged weights of a training run as a float32 pipeline."""
    return open_run(run, build_text_encoders, build_unet())


def assemble(
    run: Annotated[Path, typer.Argument(help="Folder of the training run.")],
    folder: Annotated[Path, typer.Argument(help="Where the pipeline and its judge go.")],
    classifier_minutes: Annotated[float, typer.Option(help="Training time of the judge, if there is none yet.")] = 5,
) -> None:
    """Write the pipeline of a run, and train the judge of its pictures if ``run`` has none."""
    pipe = pipeline_from_run(run)
    judge = run / "classifier.safetensors"
    if not judge.exists():
        save_classifier(train_classifier(60 * classifier_minutes, rebuild=partial(rebuilt, pipe.vae)), judge)
    save_half(pipe, run, folder)
    (folder / "classifier.safetensors").write_bytes(judge.read_bytes())


if __name__ == "__main__":
    typer.run(assemble)
