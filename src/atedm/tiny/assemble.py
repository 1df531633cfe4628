"""Turn a training run into the folder that ships: an ordinary diffusers pipeline with half-precision weights.

python -m atedm.tiny.assemble RUN FOLDER
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from atedm.tiny.few_steps import LORA
from atedm.tiny.judge import JUDGE
from atedm.tiny.pipeline import open_run, save_half
from atedm.tiny.train_clip import CLIP


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
