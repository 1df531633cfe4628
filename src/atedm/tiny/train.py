"""Train the shipped model from nothing on a CPU (or a GPU), in as many sittings as it takes.

    python -m atedm.tiny.train RUN_FOLDER --minutes 30 --canvas 64       # one object at a quarter of the cost, first
    python -m atedm.tiny.train RUN_FOLDER --minutes 120                  # then whole scenes

Run it under ``torchrun --nproc_per_node 2`` with ``OMP_NUM_THREADS=1`` to use two cores. Every sitting resumes where
the last one stopped; ``docs/reference/shipped-model.md`` has the sittings the shipped weights had.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTokenizer

from atedm.tiny.autoencoder import train_autoencoder
from atedm.tiny.dataset import encode_scenes
from atedm.tiny.pictures.checkpoint import NAME, load_state, save_state
from atedm.tiny.pictures.denoiser import Denoiser, load_parts, whole_picture
from atedm.tiny.pictures.unet import build_scheduler
from atedm.tiny.scenes import CANVAS
from atedm.tiny.text import build_text_encoders, build_tokenizer
from atedm.tiny.unet import build_unet

CAPTION_DROPOUT = 0.1
AVERAGE_DECAY = 0.99
"""Of the averaged weights, a step: a memory of a hundred steps. A thousand lag far behind in sittings this short."""


def train(
    run: Annotated[Path, typer.Argument(help="Folder of the run: made if missing, resumed if not.")],
    minutes: Annotated[float, typer.Option(help="Length of this sitting.")] = 60,
    canvas: Annotated[int, typer.Option(help="Pixels: 128 for whole scenes, 64 for one object.")] = CANVAS,
    batch: Annotated[int, typer.Option(help="Images per step and process.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of this sitting.")] = 1e-3,
    floor: Annotated[float, typer.Option(help="Share of the peak the learning rate falls to at the end.")] = 0.02,
    scenes: Annotated[int, typer.Option(help="Scenes rendered ahead per process.")] = 20_000,
    autoencoder_minutes: Annotated[float, typer.Option(help="Training time of the autoencoder, if there is none.")] = 7,
    reversed_share: Annotated[
        float, typer.Option(help="How often a scene said with 'right of' or 'below' is taken when it comes up, 0 to 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of scenes, noise and weights.")] = 0,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Begin a new run with the weights of a pipeline folder, such as the shipped one."),
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: starts at once, a fifth slower.")] = False,
) -> None:
    """Train one sitting of the shipped model."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        _prepare(run, autoencoder_minutes, seed, start_from)
    if world > 1:
        dist.barrier()
    autoencoder = AutoencoderTiny.from_pretrained(run / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    data = encode_scenes(autoencoder, tokenizer, scenes, canvas, 1000 * seed + rank, run / "cache")

    torch.manual_seed(seed)
    model = Denoiser(build_text_encoders(tokenizer), build_unet(), compiled=not eager).to(device)
    if start_from is not None and not (run / NAME).exists():
        load_parts(model, start_from)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    seen = load_state(run, model, average, [optimizer])
    trained: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    torch.manual_seed(hash((seed, rank, seen)) % 2**31)
    alphas = build_scheduler().alphas_cumprod.to(device)
    sizes = whole_picture(canvas, batch, device)
    weights = _row_weights(data.ids, tokenizer, reversed_share)
    start, steps, total, shown = time.monotonic(), 0, 0.0, time.monotonic()
    while (spent := (time.monotonic() - start) / 60) < minutes:
        if world > 1:  # every process must stop at the same step
            clock = torch.tensor(spent)
            dist.broadcast(clock, 0)
            if (spent := float(clock)) >= minutes:
                break
        rate = (
            lr * min(1.0, (steps + 1) / 100) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * spent / minutes)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.multinomial(weights, batch, replacement=True)
        clean, ids = data.latents[rows].float().to(device), data.ids[rows].long().to(device)
        # More of the noisy steps, where colours, shapes and places are decided.
        timesteps = (1000 * torch.rand(batch, device=device) ** 0.6).long().clamp(max=999)
        noise = torch.randn_like(clean)
        signal, sigma = (a[timesteps].sqrt()[:, None, None, None] for a in (alphas, 1 - alphas))
        keep = (torch.rand(batch, device=device) >= CAPTION_DROPOUT).float()
        with torch.autocast(device.type, torch.bfloat16):
            v = trained(signal * clean + sigma * noise, timesteps, ids, keep, sizes)
        loss = (v.float() - (signal * noise - sigma * clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps, seen = steps + 1, seen + batch * world
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - AVERAGE_DECAY)
        total += float(loss.detach())
        if rank == 0 and steps % 50 == 0:
            speed = 50 * batch * world / (time.monotonic() - shown)
            print(
                f"{spent:6.1f} min  step {steps}  seen {seen}  loss {total / 50:.4f}  {speed:.0f} images/s", flush=True
            )
            total, shown = 0.0, time.monotonic()
        if rank == 0 and steps % 500 == 0:
            save_state(run, model, average, [optimizer], seen)
    if rank == 0:
        save_state(run, model, average, [optimizer], seen)
        sitting = {"canvas": canvas, "minutes": minutes, "steps": steps, "batch": batch * world, "lr": lr, "seen": seen}
        with (run / "sittings.jsonl").open("a") as log:
            log.write(json.dumps(sitting) + "\n")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _row_weights(ids: Tensor, tokenizer: Any, reversed_share: float) -> Tensor:
    """Weigh down scenes whose second object is the left or upper one.

    With all four relations equally often, neither the order of the objects nor the relation alone says which object
    goes where, so neither has a gradient to start from. A majority in which the first object is the left or upper one
    gives the order a meaning first; the minority then only has to learn to turn it round.
    """
    weights = torch.ones(len(ids))
    for word in ("right", "below"):
        weights[(ids == tokenizer.convert_tokens_to_ids(f"{word}</w>")).any(dim=1)] = reversed_share
    return weights


def _prepare(run: Path, autoencoder_minutes: float, seed: int, start_from: Path | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
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
            train_autoencoder(60 * autoencoder_minutes, seed=seed).save_pretrained(partial)
        partial.replace(run / part)


if __name__ == "__main__":
    typer.run(train)
