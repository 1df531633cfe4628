"""Train the judge of the model that ships on rendered scenes.

python -m atedm.tiny.train_judge RUN --minutes 30
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
from torch.nn import functional

from atedm.files import written_whole
from atedm.tiny.autoencoder import rebuilt
from atedm.tiny.download import ObjectsArchive, load_atlas
from atedm.tiny.judge import HEADS, JUDGE, SceneReader, accuracy, judge, places_of, save_judge, targets_of
from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import held_out_scenes
from atedm.tiny.seen_scenes import SeenScenes

_WEIGHT = 4.0
"""Of the places of an object in the loss, over those of nothing: there are six times as many of these."""
_CHECKED = 512
"""Held-out scenes that it is tried on after a sitting."""


def train_judge(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has an autoencoder.")],
    minutes: Annotated[float, typer.Option(help="Length of this sitting; the learning rate falls to zero in it.")] = 20,
    batch: Annotated[int, typer.Option(help="Scenes a step.")] = 32,
    uses: Annotated[int, typer.Option(help="How often a scene is used; 1 on a GPU.")] = 10,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of scenes and weights.")] = 0,
    archive: ObjectsArchive = None,
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
    lessons = SeenScenes(atlas, autoencoder, rng, batch=batch, uses=uses)
    start, step, shown = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        scenes, images, masks = lessons.draw()
        targets = {name: target.to(device) for name, target in targets_of(scenes).items()}
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        shift = tuple(int(n) for n in rng.integers(-6, 7, size=2))
        seen = (images + 0.05 * rng.random() * torch.randn_like(images)).clamp(0, 1).roll(shift, dims=(2, 3))
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(seen)
        places = places_of(scenes, masks.roll(shift, dims=(2, 3)))
        missed = functional.cross_entropy(logits["places"].float(), places, reduction="none")
        loss = (missed * (1 + _WEIGHT * (1 - places[:, 0]))).mean()
        for name in HEADS:
            if (targets[name] >= 0).any():
                loss = loss + 0.2 * functional.cross_entropy(logits[name].float(), targets[name], ignore_index=-1)
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
    model: SceneReader, atlas: Atlas, autoencoder: AutoencoderTiny, through: bool
) -> dict[str, float]:
    """Share of what held-out scenes show that the judge reads right: see `accuracy`."""
    rng = np.random.default_rng(5)
    judgements = []
    for start in range(0, _CHECKED, 32):
        scenes = held_out_scenes(_CHECKED, 5)[start : start + 32]
        images = render(scenes, atlas, rng).images
        images = rebuilt(autoencoder, images) if through else images
        judgements += [judge(scene, seen) for scene, seen in zip(scenes, model.read(images), strict=True)]
    return accuracy(judgements)


if __name__ == "__main__":
    typer.run(train_judge)
