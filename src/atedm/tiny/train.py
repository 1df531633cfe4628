"""Train the model that ships from nothing on a CPU or a GPU, in as many sittings as it takes.

    python -m atedm.tiny.train RUN --images 95000 --canvas 128 --crop 64 --batch 16 --lr 1.5e-3
    python -m atedm.tiny.train RUN --images 300000 --canvas 256 --crop 128 --batch 24 --uses 6 --lr 1.3e-3
    python -m atedm.tiny.train RUN --images 330000 --canvas 256 --batch 8 --lr 7e-4 --cooldown 30000

Squares around an object teach what objects look like, at a third of the cost of whole pictures (Wang et al., 2023,
Patch Diffusion). SDXL's size conditioning tells the model where a square was cut out. Whole pictures come last.

``--images`` counts from the beginning of the run, so that a sitting that was cut off goes on by the same command. Run
it under ``torchrun --nproc_per_node 2`` with ``OMP_NUM_THREADS=1`` to use two cores. ``--transformer`` trains SD3's
class; with ``--teacher FOLDER`` it learns the features of the small SDXL beside the pictures.
``docs/reference/shipped-model.md`` has the sittings the weights had.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTokenizer

from atedm.tiny.autoencoder import train_autoencoder
from atedm.tiny.checkpoint import NAME, load_state, save_state
from atedm.tiny.data import ScenePool
from atedm.tiny.denoiser import load_parts
from atedm.tiny.download import ObjectsArchive, load_atlas
from atedm.tiny.features import WIDTHS, Teacher
from atedm.tiny.models import TRANSFORMER, UNET, build_model
from atedm.tiny.noise_paths import training_loss
from atedm.tiny.objects import FEWER_OBJECTS, OBJECTS
from atedm.tiny.optimizers import build_optimizers
from atedm.tiny.samples import draw_samples
from atedm.tiny.scenes import CANVAS
from atedm.tiny.text import build_tokenizer
from atedm.tiny.text_lessons import teach_text_encoders

AVERAGE_DECAY = 0.995
"""Of the averaged weights, a step: a memory of two hundred steps, because sittings on a CPU have few."""
_WARMUP = 6000
"""Images over which the learning rate rises, at the beginning of a run."""


def train(
    run: Annotated[Path, typer.Argument(help="Folder of the run: made if missing, resumed if not.")],
    images: Annotated[int, typer.Option(help="Stop when the run has seen so many images, earlier sittings counted.")],
    canvas: Annotated[int, typer.Option(help="Pixels a side: 64, 128 or 256.")] = CANVAS,
    batch: Annotated[int, typer.Option(help="Images a step and process.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    muon: Annotated[bool, typer.Option(help="Muon in place of AdamW for matrices and kernels of the U-Net.")] = True,
    cooldown: Annotated[int, typer.Option(help="Let the learning rate fall to zero over the last so many images.")] = 0,
    transformer: Annotated[bool, typer.Option("--transformer", help="Train SD3's class in place of SDXL's.")] = False,
    crop: Annotated[
        int | None, typer.Option(help="Teach squares of so many pixels around an object, not whole pictures.")
    ] = None,
    objects: Annotated[int | None, typer.Option(help="Objects a scene; by default one to three.")] = None,
    pool: Annotated[int, typer.Option(help="Encoded scenes held a process.")] = 2048,
    uses: Annotated[int, typer.Option(help="How often each is drawn; 1 on a GPU.")] = 4,
    autoencoder_minutes: Annotated[float, typer.Option(help="Training time of the autoencoder, if there is none.")] = 8,
    text_steps: Annotated[int, typer.Option(help="First lessons of the text encoders, on a new run.")] = 3000,
    archive: ObjectsArchive = None,
    save_minutes: Annotated[float, typer.Option(help="How often a checkpoint is written.")] = 5,
    sample_minutes: Annotated[float, typer.Option(help="How often a sheet of samples is drawn; 0 is never.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of scenes, noise and weights.")] = 0,
    start_from: Annotated[Path | None, typer.Option(help="Begin a new run with the weights of a pipeline.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Show the transformer the features of the small SDXL in this folder.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: starts at once, a fifth slower.")] = False,
) -> None:
    """Train one sitting of the model that ships."""
    if teacher is not None and not transformer:
        raise typer.BadParameter("--teacher goes with --transformer, which learns from it")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if rank == 0:
        _prepare(run, archive, autoencoder_minutes, seed, start_from, device)
    if world > 1:
        dist.barrier()
    autoencoder = AutoencoderTiny.from_pretrained(run / "vae").to(device)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    torch.manual_seed(seed)
    part = TRANSFORMER if transformer else UNET
    names = FEWER_OBJECTS if transformer else tuple(OBJECTS)
    widths = WIDTHS if teacher is not None else ()
    model, path, scheduler = build_model(part, tokenizer, device, compiled=not eager, teacher_widths=widths)
    if not (run / NAME).exists():
        if start_from is not None:
            load_parts(model, start_from)
        elif rank == 0 and text_steps:
            encoders = (model.text_encoder, model.text_encoder_2)
            teach_text_encoders(encoders, tokenizer, load_atlas(run / "objects").to(device), text_steps, seed=seed)
    # The first process gives its weights to the others.
    trained: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = build_optimizers(model, lr, muon)
    seen = load_state(run, model, average, optimizers)
    if seen >= images:
        print(f"this run has seen {seen} images already; ask for more")
        if world > 1:
            dist.destroy_process_group()
        return
    scenes = ScenePool(
        load_atlas(run / "objects", archive).to(device),
        autoencoder,
        tokenizer,
        canvas,
        size=pool,
        uses=uses,
        seed=hash((seed, rank, seen)) % 2**31,
        objects=objects,
        crop=crop,
        teacher=None if teacher is None else Teacher(teacher, tokenizer, device),
        names=names,
    )
    steps, total, began, shown, saved, drawn = 0, 0.0, *([time.monotonic()] * 4)
    while seen < images:
        left = (images - seen) / cooldown if cooldown else 1.0
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (seen + batch * world) / _WARMUP, left)
        torch.manual_seed(hash((seed, rank, seen)) % 2**31)  # so that a run that is resumed has the same noise
        loss = training_loss(trained, scenes.draw(batch), path)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        steps, seen = steps + 1, seen + batch * world
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - AVERAGE_DECAY)
        total += float(loss.detach())
        if rank:
            continue
        now = time.monotonic()
        if steps % 50 == 0:
            speed = 50 * batch * world / (now - shown)
            print(
                f"{(now - began) / 60:6.1f} min  seen {seen}  loss {total / 50:.4f}  {speed:.0f} images/s", flush=True
            )
            total, shown = 0.0, now
        if now - saved > 60 * save_minutes:
            save_state(run, model, average, optimizers, seen)
            saved = now
        if sample_minutes and now - drawn > 60 * sample_minutes:
            sheet = run / f"samples-{canvas}-{seen}.png"
            draw_samples(average, scheduler, autoencoder, tokenizer, canvas, sheet, names=names)
            drawn = time.monotonic()
    if rank == 0:
        save_state(run, model, average, optimizers, seen)
        sitting = {"canvas": canvas, "minutes": round((time.monotonic() - began) / 60, 1), "batch": batch * world}
        with (run / "sittings.jsonl").open("a") as log:
            log.write(json.dumps({**sitting, "crop": crop, "lr": lr, "cooldown": cooldown, "seen": seen}) + "\n")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _prepare(
    run: Path,
    archive: Path | None,
    autoencoder_minutes: float,
    seed: int,
    start_from: Path | None,
    device: torch.device,
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    load_atlas(run / "objects", archive)
    for part in ("tokenizer", "vae"):
        if (run / part).exists():
            continue
        partial = run / f".{part}.partial"  # a folder, too, is whole or not there
        shutil.rmtree(partial, ignore_errors=True)
        if start_from is not None:
            shutil.copytree(start_from / part, partial)
        elif part == "tokenizer":
            build_tokenizer(partial)
        else:
            atlas = load_atlas(run / "objects").to(device)
            train_autoencoder(atlas, 60 * autoencoder_minutes, seed=seed).save_pretrained(partial)
        partial.replace(run / part)


if __name__ == "__main__":
    typer.run(train)
