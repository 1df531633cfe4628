"""The shipped CLIP: a small open_clip model of scenes and captions, so that CLIP score and FID need no download."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from atedm.tiny import weights_folder
from atedm.tiny.classifier import canonical
from atedm.tiny.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    held_out_scenes,
    render_batch,
    sample_scene,
)
from atedm.tiny.text import TOKENS

WEIGHTS_FILE = "open_clip_model.safetensors"
KINDS = ("count", "colour", "shape", "relation", "background", "texture")
"""What a caption can be wrong in."""
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        # Four stages and an attention pool: colours and places are learned much faster than by patches.
        "vision_cfg": {"image_size": CANVAS, "layers": [1, 1, 1, 1], "width": 10, "head_width": 32},
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": 187,
            "hf_tokenizer_name": "scenes",  # any name: of a local folder open_clip reads the tokenizer inside it
            "width": 64,
            "heads": 4,
            "layers": 3,
            # The first object has to know the relation that is said after it.
            "no_causal_mask": True,
            "pool_type": "eos",  # the first end token: padding is the same token, and its number is low
            "eos_id": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def changed(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """Change one thing a caption says so that the picture no longer shows it.

    Args:
        scene: What the picture shows.
        kind: One of `KINDS`. "count" leaves out an object of two, or adds one; "colour" and "shape" change one object.
        rng: Source of the choice.

    Returns:
        A scene that differs, or None where there is nothing to change (one object has no relation).
    """
    objects, background, texture, relation = list(scene.objects), scene.background, scene.texture, scene.relation
    if kind == "count":
        if relation is not None:
            return Scene((objects[int(rng.integers(2))],), background, texture)
        extra = (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
        return Scene((objects[0], extra), background, texture, str(rng.choice(RELATIONS)))
    which = int(rng.integers(len(objects)))
    colour, shape = objects[which]
    if kind == "colour":
        objects[which] = (_other(COLOURS, colour, rng), shape)
    elif kind == "shape":
        objects[which] = (colour, _other(SHAPES, shape, rng))
    elif kind == "background":
        background = _other(BACKGROUNDS, background, rng)
    elif kind == "texture":
        texture = _other(TEXTURES, texture, rng)
    elif relation is None:
        return None
    else:
        # Of two equal objects, "above" and "below" show the same.
        twin = RELATIONS[RELATIONS.index(relation) ^ 1] if objects[0] == objects[1] else relation
        relation = str(rng.choice([word for word in RELATIONS if word not in (relation, twin)]))
    return Scene(tuple(objects), background, texture, relation)


def _other(words: Sequence[str] | dict[str, Any], word: str, rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in words if other != word]))


def _wrong_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One caption for each of `KINDS`, wrong in that and none held out; where a kind has none, another colour."""
    captions = []
    for kind in KINDS:
        wrong = changed(scene, kind, rng)
        while wrong is None or wrong.held_out:
            wrong = changed(scene, "colour", rng)
        captions.append(wrong.caption)
    return captions


def _said(scene: Scene, turned: bool) -> Scene:
    """Say a scene with the left or upper object first, or (``turned``) last, unless that caption is held out."""
    one = canonical(scene)
    if turned and one.relation is not None:
        one = Scene(one.objects[::-1], one.background, one.texture, RELATIONS[RELATIONS.index(one.relation) + 1])
    return scene if one.held_out else one


def train_clip(
    folder: Path,
    *,
    steps: int,
    minutes: float | None = None,
    batch: int = 64,
    pool: int = 12_000,
    rebuilt: int = 1000,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Train on rendered training scenes and write an ordinary open_clip folder, whole or not at all.

    The loss is open_clip's contrastive one over the batch, plus the cross-entropy of each image's own caption among
    captions that are wrong in one thing: in a batch of random scenes a model can win without looking at the texture.

    Equal seeds give equal weights on one machine and one thread, unless ``minutes`` is given.

    Args:
        folder: Where the model goes.
        steps: Training steps.
        minutes: Train for this long instead of for ``steps``; the learning rate follows the clock.
        batch: Images a step.
        pool: Scenes rendered ahead.
        rebuilt: How many of them go through the shipped autoencoder, as pictures to be scored do; a quarter of a batch.
        seed: Seed of scenes and weights.
        report: Called with lines of progress.
    """
    import open_clip

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch)
        (made / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        for file in sorted((weights_folder() / "tokenizer").iterdir()):
            shutil.copyfile(file, made / file.name)
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{made}", load_weights=False)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{made}")
        rng = np.random.default_rng([seed, 3])
        scenes, images = _pool(pool, rebuilt, rng)
        report(f"clip: {pool} scenes rendered, {sum(p.numel() for p in model.parameters())} weights")
        _fit(model, tokenizer, scenes, images, rebuilt, steps, minutes, batch, rng, report)
        weights = model.state_dict()
        save_file({key: w.half() if w.is_floating_point() else w for key, w in weights.items()}, made / WEIGHTS_FILE)
        folder.mkdir(exist_ok=True)
        for file in sorted(made.iterdir(), key=lambda file: file.name == WEIGHTS_FILE):  # the weights last
            file.replace(folder / file.name)


def _fit(
    model: Any,
    tokenizer: Any,
    scenes: Sequence[Scene],
    images: Tensor,
    rebuilt: int,
    steps: int,
    minutes: float | None,
    batch: int,
    rng: np.random.Generator,
    report: Callable[[str], None],
) -> None:
    from open_clip import ClipLoss

    contrast, start, step, done = ClipLoss(), time.monotonic(), 0, 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, betas=(0.9, 0.98))
    model.train()
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done)))
        rows = np.r_[rng.integers(0, rebuilt, batch // 4), rng.integers(0, len(scenes), batch - batch // 4)]
        # As long as objects are said in either order equally often, neither the order nor the relation alone says
        # which object goes where, and neither is learned: the left or upper one comes first to begin with.
        said = [_said(scenes[row], rng.random() < 0.5 * min(1.0, done / 0.3)) for row in rows]
        captions = [text for scene in said for text in (scene.caption, *_wrong_captions(scene, rng))]
        seen = (images[rows].float() / 255).roll(tuple(int(n) for n in rng.integers(-3, 4, size=2)), dims=(2, 3))
        seen = (seen + 0.03 * rng.random() * torch.randn_like(seen)).clamp(0, 1)
        looks = model.encode_image((seen - 0.5) / 0.5, normalize=True)
        words = model.encode_text(tokenizer(captions), normalize=True).unflatten(0, (batch, -1))
        scale = model.logit_scale.exp()
        own = scale * torch.einsum("bd,bkd->bk", looks, words)
        loss = contrast(looks, words[:, 0], scale) + F.cross_entropy(own, torch.zeros(batch, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))  # as open_clip trains
        step += 1
        spent = time.monotonic() - start
        done = step / steps if minutes is None else spent / (60 * minutes)
        if step % 50 == 0:
            right = float((own.detach().argmax(1) == 0).float().mean())
            report(f"clip: {spent:.0f} s, step {step}, loss {float(loss.detach()):.3f}, own caption first {right:.2f}")


def _pool(count: int, rebuilt: int, rng: np.random.Generator) -> tuple[list[Scene], Tensor]:
    """Training scenes and their pictures (count, 3, 128, 128) uint8, the first of them through the autoencoder."""
    scenes = [sample_scene(rng) for _ in range(count)]
    rebuild = _autoencoder()
    images = torch.empty(count, 3, CANVAS, CANVAS, dtype=torch.uint8)
    for first in range(0, count, 50):
        some = render_batch(scenes[first : first + 50], rng)
        if (through := rebuilt - first) > 0:
            some[:through] = rebuild(some[:through])
        images[first : first + 50] = (some * 255).round().to(torch.uint8)
    return scenes, images


def _autoencoder() -> Callable[[Tensor], Tensor]:
    vae = AutoencoderTiny.from_pretrained(weights_folder() / "vae", torch_dtype=torch.float32)

    def rebuild(images: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = vae.encode(images * 2 - 1).latents
            made: Tensor = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample
        return (made / 2 + 0.5).clamp(0, 1).clone()

    return rebuild


@torch.inference_mode()
def check(folder: Path, *, count: int = 400, through_autoencoder: bool = False, seed: int = 0) -> dict[str, float]:
    """Ask a written model about scenes whose captions it never read.

    Args:
        folder: The open_clip folder.
        count: Scenes, a multiple of 100.
        through_autoencoder: Send the pictures through the shipped autoencoder first, as a pipeline would.
        seed: Seed of the scenes.

    Returns:
        For each of `KINDS` the share of right captions that score higher than one wrong in that; "mean" of those;
        "1 in 100", the share of pictures whose own caption scores highest among 100; "score", the mean cosine of a
        picture and its own caption, and "other score" of a picture and another's.
    """
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    rng = np.random.default_rng([seed, 4])
    scenes = held_out_scenes(count, seed=seed)
    torch.manual_seed(seed)
    images = render_batch(scenes, rng)
    if through_autoencoder:
        images = torch.cat([_autoencoder()(some) for some in torch.split(images, 50)])
    looks = torch.cat([model.encode_image((some - 0.5) / 0.5, normalize=True) for some in torch.split(images, 50)])
    words = model.encode_text(tokenizer([scene.caption for scene in scenes]), normalize=True)
    own = (looks * words).sum(1)
    shares = {}
    for kind in KINDS:
        pairs = [(i, wrong.caption) for i, scene in enumerate(scenes) if (wrong := changed(scene, kind, rng))]
        rows = torch.tensor([i for i, _ in pairs])
        wrong = (looks[rows] * model.encode_text(tokenizer([text for _, text in pairs]), normalize=True)).sum(1)
        shares[kind] = float((own[rows] > wrong).float().mean())
    shares["mean"] = sum(shares.values()) / len(KINDS)
    found = [a @ b.T for a, b in zip(torch.split(looks, 100), torch.split(words, 100), strict=True)]
    shares["1 in 100"] = float(torch.cat([s.argmax(1) == torch.arange(len(s)) for s in found]).float().mean())
    return {**shares, "score": float(own.mean()), "other score": float((looks * words.roll(1, 0)).sum(1).mean())}


def main(
    folder: Annotated[Path, typer.Argument(help="Where the open_clip model goes.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    minutes: Annotated[float | None, typer.Option(help="Train for this long instead.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of scenes and weights.")] = 0,
    check_only: Annotated[bool, typer.Option("--check", help="Train nothing; print how good FOLDER is.")] = False,
) -> None:
    """Train the shipped CLIP and print how well it tells held-out captions from wrong ones."""
    if not check_only:
        train_clip(folder, steps=steps, minutes=minutes, seed=seed, report=lambda line: print(line, flush=True))
    for through in (False, True):
        shares = check(folder, through_autoencoder=through)
        print("through the autoencoder" if through else "as rendered", end=": ")
        print(", ".join(f"{name} {share:.3f}" for name, share in shares.items()))


if __name__ == "__main__":
    typer.run(main)
