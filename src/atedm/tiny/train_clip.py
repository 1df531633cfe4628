"""Train the CLIP model of the scenes: a small open_clip model, so that CLIP score and FID need no download.

python -m atedm.tiny.train_clip RUN --minutes 40
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from atedm.files import written_whole
from atedm.tiny.autoencoder import rebuilt
from atedm.tiny.download import ObjectsArchive, load_atlas
from atedm.tiny.rendering import Atlas, render
from atedm.tiny.scenes import Scene, held_out_scenes
from atedm.tiny.seen_scenes import SeenScenes
from atedm.tiny.text import TOKENS
from atedm.tiny.wrong_captions import KINDS, changed, wrong_captions

CLIP = "clip"
"""Name of the open_clip folder, in a run and in the folder that ships."""
_WEIGHTS = "open_clip_model.safetensors"
_SIDE = 128
_LR = 2e-3
_CHECKED = 400
"""Held-out scenes that it is tried on after a sitting; a multiple of 100."""
_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        # Four stages and an attention pool: objects and places are learned much faster than by patches.
        "vision_cfg": {"image_size": _SIDE, "layers": [1, 1, 1, 1], "width": 10, "head_width": 32},
        "text_cfg": {
            "context_length": TOKENS,
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


def train_clip(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has an autoencoder and a tokenizer.")],
    minutes: Annotated[float, typer.Option(help="Length of this sitting; the learning rate falls to zero in it.")] = 40,
    batch: Annotated[int, typer.Option(help="Scenes a step.")] = 64,
    uses: Annotated[int, typer.Option(help="How often a scene is used; 1 on a GPU.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of scenes and weights.")] = 0,
    archive: ObjectsArchive = None,
) -> None:
    """Train on rendered scenes for a wall-clock time, from the last weights if there are any, and print how good it is.

    The loss is open_clip's contrastive one over the batch, plus the cross-entropy of each image's own caption among
    captions that are wrong in one thing: in a batch of random scenes a model can win without looking at relations.
    """
    from open_clip import ClipLoss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, int(time.time())])  # a further sitting sees other scenes
    atlas = load_atlas(run / "objects", archive).to(device)
    autoencoder = AutoencoderTiny.from_pretrained(run / "vae").to(device)
    model, tokenizer = _open(run / CLIP, run / "tokenizer")
    model.to(device).train()
    lessons = SeenScenes(atlas, autoencoder, rng, batch=batch, uses=uses)
    contrast = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=1e-2, betas=(0.9, 0.98))
    start, step, shown, right = time.monotonic(), 0, 0.0, 0.0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        scenes, images, _ = lessons.draw()
        captions = [text for scene in scenes for text in (scene.caption, *wrong_captions(scene, rng))]
        seen = functional.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        seen = seen.roll(tuple(int(n) for n in rng.integers(-3, 4, size=2)), dims=(2, 3))
        seen = (seen + 0.03 * rng.random() * torch.randn_like(seen)).clamp(0, 1)
        with torch.autocast(device.type, torch.bfloat16):
            looks = model.encode_image((seen - 0.5) / 0.5, normalize=True).float()
            words = model.encode_text(tokenizer(captions).to(device), normalize=True).float().unflatten(0, (batch, -1))
        scale = model.logit_scale.exp()
        own = scale * torch.einsum("bd,bkd->bk", looks, words)
        nearest = torch.zeros(batch, dtype=torch.long, device=device)
        loss = contrast(looks, words[:, 0], scale) + functional.cross_entropy(own, nearest)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as open_clip trains
        step += 1
        right += 0.02 * (float((own.detach().argmax(1) == 0).float().mean()) - right)
        if (now := time.monotonic() - start) - shown > 30:
            shown = now
            print(f"clip: {now / 60:.1f} min, step {step}, loss {float(loss.detach()):.3f}, own first {right:.2f}")
            _save(model, run / CLIP)
    _save(model, run / CLIP)
    for what, through in (("rendered", False), ("through the autoencoder", True)):
        shares = check(run / CLIP, atlas, autoencoder if through else None)
        print(what, ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))


def _open(folder: Path, tokenizer: Path) -> tuple[Any, Any]:
    """Open the model of an open_clip folder in float32; where there is none, make one with random weights."""
    import open_clip

    if not (folder / "open_clip_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file in tokenizer.iterdir():
            shutil.copyfile(file, folder / file.name)
        words = len(json.loads((tokenizer / "vocab.json").read_text()))
        config = {**_CONFIG, "model_cfg": {**_CONFIG["model_cfg"]}}
        config["model_cfg"]["text_cfg"] = {**_CONFIG["model_cfg"]["text_cfg"], "vocab_size": words}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, load_weights=False)
    if (folder / _WEIGHTS).exists():
        model.load_state_dict(load_file(folder / _WEIGHTS))
    return model, open_clip.get_tokenizer(name)


def _save(model: Any, folder: Path) -> None:
    weights = {key: w.half() if w.is_floating_point() else w for key, w in model.state_dict().items()}
    with written_whole(folder / _WEIGHTS) as partial:
        save_file({key: w.contiguous() for key, w in weights.items()}, partial)


@torch.inference_mode()
def check(folder: Path, atlas: Atlas, autoencoder: AutoencoderTiny | None = None) -> dict[str, float]:
    """Ask a written model about scenes whose captions it never read.

    Args:
        folder: The open_clip folder.
        atlas: Of the objects.
        autoencoder: What the pictures are sent through first, as a pipeline would.

    Returns:
        For each of `KINDS` the share of right captions that score higher than one wrong in that; "1 in 100", the share
        of pictures whose own caption scores highest among 100; "score", the mean cosine of a picture and its own
        caption, and "other score" of a picture and another's.
    """
    model, tokenizer = _open(folder, folder)
    model.eval()
    rng = np.random.default_rng([0, 4])
    torch.manual_seed(0)
    scenes = held_out_scenes(_CHECKED)
    looks = torch.cat([_look(model, scenes[i : i + 50], atlas, autoencoder, rng) for i in range(0, _CHECKED, 50)])
    words = model.encode_text(tokenizer([scene.caption for scene in scenes]), normalize=True)
    own = (looks * words).sum(1)
    shares = {}
    for kind in KINDS:
        pairs = [(i, wrong.caption) for i, scene in enumerate(scenes) if (wrong := changed(scene, kind, rng))]
        rows = torch.tensor([i for i, _ in pairs])
        wrong = (looks[rows] * model.encode_text(tokenizer([text for _, text in pairs]), normalize=True)).sum(1)
        shares[kind] = float((own[rows] > wrong).float().mean())
    found = [a @ b.T for a, b in zip(torch.split(looks, 100), torch.split(words, 100), strict=True)]
    shares["1 in 100"] = float(torch.cat([s.argmax(1) == torch.arange(len(s)) for s in found]).float().mean())
    return {**shares, "score": float(own.mean()), "other score": float((looks * words.roll(1, 0)).sum(1).mean())}


def _look(
    model: Any,
    scenes: Sequence[Scene],
    atlas: Atlas,
    autoencoder: AutoencoderTiny | None,
    rng: np.random.Generator,
) -> Tensor:
    images = render(scenes, atlas, rng).images
    if autoencoder is not None:
        images = rebuilt(autoencoder, images)
    images = functional.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True).cpu()
    looks: Tensor = model.encode_image((images - 0.5) / 0.5, normalize=True)
    return looks


if __name__ == "__main__":
    typer.run(train_clip)
