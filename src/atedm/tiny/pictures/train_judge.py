"""Train the judge of the picture model on rendered scenes.

python -m atedm.tiny.pictures.train_judge RUN --minutes 30
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from atedm.files import written_whole
from atedm.tiny.pictures.autoencoder import rebuilt
from atedm.tiny.pictures.download import load_atlas
from atedm.tiny.pictures.judge import HEADS, MAP, SceneReader, accuracy, judge, save_judge, targets_of
from atedm.tiny.pictures.rendering import Atlas, render
from atedm.tiny.pictures.scenes import CANVAS, held_out_scenes, sample_scene

JUDGE = "judge.safetensors"
"""Name of the judge's weights, in a run and in the folder that ships."""
_POOL = 32
"""Batches that are held."""


def train_judge(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has an autoencoder.")],
    minutes: Annotated[float, typer.Option(help="Length of this sitting; the learning rate falls to zero in it.")] = 20,
    batch: Annotated[int, typer.Option(help="Scenes a step.")] = 32,
    uses: Annotated[int, typer.Option(help="How often a scene is used; 1 on a GPU.")] = 10,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of scenes and weights.")] = 0,
    archive: Annotated[
        Path | None, typer.Option("--objects-archive", help="The npm package of the objects; fetched by default.")
    ] = None,
) -> None:
    """Train the judge for a wall-clock time, from its last weights if there are any, and print how well it reads.

    Half of the scenes are sent through the autoencoder, with noise on the latents, because every picture to be judged
    has gone that way.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, int(time.time())])  # a further sitting sees other scenes
    atlas = load_atlas(run / "objects", archive).to(device)
    autoencoder = AutoencoderTiny.from_pretrained(run / "vae").to(device)
    model = SceneReader().to(device)
    partial_file = run / "judge-training.safetensors"
    if partial_file.exists():
        model.load_state_dict(load_file(partial_file))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    pool: list[tuple[Tensor, dict[str, Tensor]]] = []
    start, step, shown = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        if step % uses == 0:
            pool = [*pool[-_POOL + 1 :], _scenes(atlas, autoencoder, rng, batch)]
        images, targets = pool[int(rng.integers(len(pool)))]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        shift = tuple(8 * int(n) for n in rng.integers(-1, 2, size=2))
        seen = (images + 0.05 * rng.random() * torch.randn_like(images)).clamp(0, 1).roll(shift, dims=(2, 3))
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(seen)
        loss = 2 * functional.cross_entropy(
            logits["objects"].float().flatten(0, 1), targets["objects"].flatten(), ignore_index=-1
        )
        loss = loss + functional.binary_cross_entropy_with_logits(
            logits["where"].float(), targets["where"].roll(tuple(n // 8 for n in shift), dims=(1, 2))
        )
        for name in HEADS:
            if (targets[name] >= 0).any():
                loss = loss + 0.5 * functional.cross_entropy(logits[name].float(), targets[name], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        if (now := time.monotonic() - start) - shown > 30:
            shown = now
            print(f"judge: {now / 60:.1f} min, step {step}, loss {float(loss.detach()):.3f}", flush=True)
            with written_whole(partial_file) as partial:
                save_file(model.state_dict(), partial)
    with written_whole(partial_file) as partial:
        save_file(model.state_dict(), partial)
    for what, through in (("rendered", False), ("through the autoencoder", True)):
        shares = held_out_accuracy(model.eval(), atlas, autoencoder, through)
        print(what, ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    save_judge(model.cpu(), run / JUDGE)


def held_out_accuracy(
    model: SceneReader, atlas: Atlas, autoencoder: AutoencoderTiny, through: bool, count: int = 512
) -> dict[str, float]:
    """Share of what held-out scenes show that the judge reads right: see `accuracy`."""
    rng = np.random.default_rng(5)
    judgements = []
    for start in range(0, count, 32):
        scenes = held_out_scenes(count, 5)[start : start + 32]
        images = render(scenes, atlas, rng).images
        images = rebuilt(autoencoder, images) if through else images
        judgements += [judge(scene, seen) for scene, seen in zip(scenes, model.read(images), strict=True)]
    return accuracy(judgements)


def _scenes(
    atlas: Atlas, autoencoder: AutoencoderTiny, rng: np.random.Generator, batch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    scenes = [sample_scene(rng) for _ in range(batch)]
    rendered = render(scenes, atlas, rng, CANVAS)
    half = batch // 2
    images = torch.cat([rebuilt(autoencoder, rendered.images[:half]), rendered.images[half:]])
    targets = targets_of(scenes) | {"where": where_objects_are(rendered.masks)}
    return images, {name: target.to(atlas.device) for name, target in targets.items()}


def where_objects_are(masks: Tensor) -> Tensor:
    """How much of each place is some object, (B, MAP, MAP), by the masks (B, 3, h, w) of a rendering."""
    return functional.adaptive_avg_pool2d(masks.sum(1).clamp(0, 1), MAP)


if __name__ == "__main__":
    typer.run(train_judge)
