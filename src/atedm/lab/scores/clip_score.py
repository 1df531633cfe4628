"""CLIP score: how well an image fits its prompt, by any open_clip model.

Hessel et al., CLIPScore, EMNLP 2021, without its factor 2.5 and without clipping at zero: the bare cosine, which is
what text-to-image papers plot, AT-EDM (CVPR 2024) among them.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from atedm.app.devices import best_device
from atedm.lab.extra import optional
from atedm.lab.scores.pixels import read_picture
from atedm.tiny import weights_folder

CLIP_MODEL, CLIP_WEIGHTS = "ViT-g-14", "laion2b_s34b_b88k"
"""open_clip's names of model and weights. The paper's "ViT-G/14" may be these, or open_clip's ViT-bigG-14."""
TINY_CLIP = "tiny"
"""Our name of the small CLIP that ships: it knows the scenes, and nothing else."""


class OpenedClip(NamedTuple):
    """An open_clip model in float32, ready to score, with what prepares its images and prompts."""

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images the model looks at."""
        size = self.model.visual.preprocess_cfg["size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def open_clip_model(model: str = CLIP_MODEL, pretrained: str = CLIP_WEIGHTS, device: str | None = None) -> OpenedClip:
    """Open a model by open_clip's own names: one of ``open_clip.list_pretrained()`` with the tag of its weights.

    "hf-hub:OWNER/NAME", "local-dir:FOLDER" and `TINY_CLIP` bring their own weights. Raises an `ImportError` if
    open_clip is not installed, and a `ValueError` if there is no such model, or its weights are neither here nor to be
    downloaded.
    """
    open_clip = optional("open_clip")
    where = torch.device(device or best_device())
    model = f"local-dir:{weights_folder() / 'clip'}" if model == TINY_CLIP else model
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip's notes go to the root logger; what matters is raised
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            model,
            pretrained=None if ":" in model else pretrained,
            precision="fp32",
            device=where,
            require_pretrained=True,  # or open_clip would go on with random weights
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:
        tried = model if ":" in model else f"{model} with the weights {pretrained!r}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot open the CLIP model {tried}: {reason}; what works is a name and a tag of "
            "open_clip.list_pretrained() and a connection, or 'local-dir:FOLDER' of an open_clip model"
        ) from error
    finally:
        logging.disable(before)
    return OpenedClip(network.eval(), preprocess, tokenizer, where)


@torch.inference_mode()
def image_features(clip: OpenedClip, pixels: Tensor) -> Tensor:
    """Return what the image tower gives, (B, d) float32, for (B, 3, *clip.size) pixels in [0, 255]."""
    config = clip.model.visual.preprocess_cfg
    mean, std = (torch.tensor(config[name], device=clip.device).view(1, 3, 1, 1) for name in ("mean", "std"))
    features: Tensor = clip.model.encode_image((pixels.to(clip.device, torch.float32) / 255 - mean) / std)
    return features


@torch.inference_mode()
def clip_scores(clip: OpenedClip, files: Sequence[Path], prompts: Sequence[str], batch: int = 32) -> list[float]:
    """Score each of n images against its own prompt. Scores of two models do not compare.

    Images are prepared by open_clip: the shortest side is resized to the model's size and the middle is cut out. A
    prompt longer than the model reads is cut off.

    Returns n cosine similarities in [-1, 1], computed in float32, or raises a `ValueError` if the two are not equally
    many, or a file is no image.
    """
    if len(files) != len(prompts):
        raise ValueError(f"each image needs its prompt: {len(files)} images and {len(prompts)} prompts")
    scores: list[float] = []
    for start in range(0, len(files), batch):
        some = slice(start, start + batch)
        pixels = torch.stack([clip.preprocess(read_picture(file)) for file in files[some]]).to(clip.device)
        looks = clip.model.encode_image(pixels, normalize=True)
        words = clip.model.encode_text(clip.tokenizer(list(prompts[some])).to(clip.device), normalize=True)
        # Two rounded vectors of length one can have a product a little above one.
        scores += (looks * words).sum(dim=1).clamp(-1, 1).tolist()
    return scores
