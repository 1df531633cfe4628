"""The families of diffusion transformers that are known, and what is particular to each.

A family is a model class of diffusers. For each of its lists of blocks a `Kind` says what the blocks are handed, what
they return, and which of their arguments belong to single tokens and have to follow those that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Given = Mapping[str, Any]
"""Arguments of a call of the whole model, by name."""


@dataclass(frozen=True)
class Table:
    """An argument of a block that has a row for each token: rotary positions, a mask, an index."""

    name: str
    #: Axis of the tokens. On axis 0 one table serves all images, so all of them keep the same tokens.
    axis: int
    #: Whose rows it has: "image", "all" in the order of attention, or "tail": a mask that lets every image token
    #: through, of which as many entries are cut off its front as tokens were dropped.
    of: str = "all"
    #: Which of a tuple of arguments; None takes all of them.
    part: int | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of block."""

    #: Name of the argument that holds the image tokens.
    image: str = "hidden_states"
    #: Name of the argument that holds the text tokens; None where the block sees none or has them among the image's.
    text: str | None = "encoder_hidden_states"
    #: Which of the tuple it returns holds the image tokens; None where it returns these alone.
    returns: int | None = None
    #: Whose keys its attentions have, one after another: "text image", "image text" or "image".
    attends: tuple[str, ...] = ("image",)
    #: Whether the argument of the image tokens holds those of the text too, in the order of the first attention.
    joined: bool = False
    tables: tuple[Table, ...] = ()

    @property
    def one_set(self) -> bool:
        """Whether all images of a batch must keep the same tokens."""
        return any(table.axis == 0 for table in self.tables)


class Grid(NamedTuple):
    """The image tokens of a call."""

    #: (h, w): tokens lie in raster order, frames and pictures of one width below one another.
    size: tuple[int, int]
    #: Whether they are one picture; else a mask over the picture cannot be laid over them.
    is_picture: bool = True

    @property
    def tokens(self) -> int:
        """N."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class Family:
    """One class of transformers."""

    #: What people call it.
    name: str
    #: Where in diffusers the class is, under ``diffusers.models.transformers``.
    module: str
    #: Kind of block by the name of the list of blocks, in the order they run.
    kinds: Mapping[str, Kind]
    #: The image tokens of a call of the model; None where they are of several sizes.
    grid: Callable[[Any, Given], Grid | None]
    #: Noise in [0, 1] by the value of the timestep; 1 is noise alone.
    noise: Callable[[float], float] = lambda t: t / 1000
    #: Names of the arguments of the model that hold the timestep and the text.
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    #: Latents a side that one token stands for.
    side: int = 2
    #: Arguments that, if given, lay something over the tokens between blocks or by their place, and what that is.
    dense_with: tuple[tuple[str, str], ...] = ()


def _patched(model: Any, given: Given) -> Grid:
    """Latents (B, C, H, W) or (B, C, T, H, W), cut in patches."""
    sides = given["hidden_states"].shape[2:]
    patch = model.config.patch_size
    patch = (patch,) * len(sides) if isinstance(patch, int) else tuple(patch)
    *frames, height, width = (side // p for side, p in zip(sides, patch, strict=True))
    return Grid((math.prod(frames) * height, width), is_picture=math.prod(frames) == 1)


def _frames_first(model: Any, given: Given) -> Grid:
    """Latents (B, T, C, H, W), each frame cut in patches."""
    _, frames, _, height, width = given["hidden_states"].shape
    patch = model.config.patch_size
    frames //= getattr(model.config, "patch_size_t", None) or 1
    return Grid((frames * (height // patch), width // patch), is_picture=frames == 1)


def _by_ids(_: Any, given: Given) -> Grid:
    """Packed latents (B, N, C), whose places are in the columns of ``img_ids`` (N, 3 or 4)."""
    tokens, ids = int(given["hidden_states"].shape[1]), given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.device.type == "meta":
        side = math.isqrt(tokens)
        return Grid((side, tokens // side) if tokens % side == 0 else (1, tokens))
    rows = ids.float().cpu()
    # By picture: the one that is made, and those to go by.
    lengths = rows[:, 0].unique_consecutive(return_counts=True)[1].tolist()
    sides = [((part[-1, 1:3] - part[0, 1:3]).int() + 1).tolist() for part in rows.split(lengths)]
    return _below_one_another([(1, *side) for side in sides], tokens)


def _by_shapes(_: Any, given: Given) -> Grid:
    """Packed latents (B, N, C), with ``img_shapes``: (frames, h, w) of each picture, image by image."""
    tokens, shapes = int(given["hidden_states"].shape[1]), given["img_shapes"]
    first = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    return _below_one_another([tuple(shape) for shape in first], tokens)


def _below_one_another(pictures: list[tuple[int, ...]], tokens: int) -> Grid:
    """Make one grid of pictures, (frames, h, w) each, if they are of one width; else tokens lie in a row."""
    rows = sum(frames * height for frames, height, _ in pictures)
    width = pictures[0][2]
    if all(picture[2] == width for picture in pictures) and rows * width == tokens:
        return Grid((rows, width), is_picture=len(pictures) == 1 and pictures[0][0] == 1)
    return Grid((1, tokens), is_picture=False)


def _by_sides(_: Any, given: Given) -> Grid:
    """Packed latents (B, N, C) with ``num_frames``, ``height`` and ``width`` beside them."""
    tokens = int(given["hidden_states"].shape[1])
    frames, height, width = (given.get(name) for name in ("num_frames", "height", "width"))
    if frames and height and width and frames * height * width == tokens:
        return Grid((frames * height, width), is_picture=frames == 1)
    return Grid((1, tokens), is_picture=False)


def _of_list(_: Any, given: Given) -> Grid | None:
    """A list of latents (C, T, H, W), one an image."""
    latents = given["x"]
    if not all(isinstance(x, Tensor) and x.shape == latents[0].shape for x in latents):
        return None
    patch, frames = given.get("patch_size", 2), latents[0].shape[1] // given.get("f_patch_size", 1)
    height, width = (side // patch for side in latents[0].shape[2:])
    return Grid((frames * height, width), is_picture=frames == 1)


_TEXT_IMAGE, _IMAGE_TEXT, _IMAGE = ("text image",), ("image text",), ("image",)
_ROTARY = Table("image_rotary_emb", 0)
_FLUX = Kind(returns=1, attends=_TEXT_IMAGE, tables=(_ROTARY,))
_CHROMA = Kind(returns=1, attends=_TEXT_IMAGE, tables=(_ROTARY, Table("attention_mask", 1)))
_HUNYUAN = Kind(
    returns=0,
    attends=_IMAGE_TEXT,
    tables=(Table("image_rotary_emb", 0, "image"), Table("attention_mask", -1, "tail")),
)
_CONTROLNET = "the residuals of a ControlNet are added between its blocks, to all tokens"
_CONTROLLED = (("controlnet_block_samples", _CONTROLNET), ("controlnet_single_block_samples", _CONTROLNET))


def _as_noise(t: float) -> float:
    return t


FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": Family(
        "Stable Diffusion 3, 3.5",
        "transformer_sd3",
        # In the larger model some blocks have a second attention, to the image alone.
        {"transformer_blocks": Kind(returns=1, attends=("image text", "image"))},
        _patched,
        dense_with=(("block_controlnet_hidden_states", _CONTROLNET), ("skip_layers", "layers are skipped")),
    ),
    "PixArtTransformer2DModel": Family(
        "PixArt-α, PixArt-Σ", "pixart_transformer_2d", {"transformer_blocks": Kind(text=None)}, _patched
    ),
    "FluxTransformer2DModel": Family(
        "FLUX.1 (dev, schnell, Kontext, Fill, Control)",
        "transformer_flux",
        {"transformer_blocks": _FLUX, "single_transformer_blocks": _FLUX},
        _by_ids,
        _as_noise,
        dense_with=_CONTROLLED,
    ),
    "Flux2Transformer2DModel": Family(
        "FLUX.2",
        "transformer_flux2",
        {
            "transformer_blocks": _FLUX,
            "single_transformer_blocks": Kind(text=None, attends=_TEXT_IMAGE, joined=True, tables=(_ROTARY,)),
        },
        _by_ids,
        _as_noise,
        dense_with=(("kv_cache", "keys of the reference pictures are kept by their place"),),
    ),
    "ChromaTransformer2DModel": Family(
        "Chroma",
        "transformer_chroma",
        {
            "transformer_blocks": _CHROMA,
            "single_transformer_blocks": Kind(text=None, attends=_TEXT_IMAGE, joined=True, tables=_CHROMA.tables),
        },
        _by_ids,
        _as_noise,
        dense_with=_CONTROLLED,
    ),
    "QwenImageTransformer2DModel": Family(
        "Qwen-Image, Qwen-Image-Edit",
        "transformer_qwenimage",
        {
            "transformer_blocks": Kind(
                returns=1,
                attends=_TEXT_IMAGE,
                tables=(Table("image_rotary_emb", 0, "image", part=0), Table("modulate_index", 1, "image")),
            )
        },
        _by_shapes,
        _as_noise,
        dense_with=_CONTROLLED[:1],
    ),
    "HunyuanImageTransformer2DModel": Family(
        "HunyuanImage 2.1",
        "transformer_hunyuanimage",
        {"transformer_blocks": _HUNYUAN, "single_transformer_blocks": _HUNYUAN},
        _patched,
        side=1,
    ),
    "ZImageTransformer2DModel": Family(
        "Z-Image",
        "transformer_z_image",
        {
            "layers": Kind(
                image="x",
                text=None,
                attends=_IMAGE_TEXT,
                joined=True,
                tables=(Table("attn_mask", 1), Table("freqs_cis", 1)),
            )
        },
        _of_list,
        lambda t: 1 - t,
        timestep="t",
        text="cap_feats",
        dense_with=(
            ("controlnet_block_samples", _CONTROLNET),
            ("siglip_feats", "pictures to go by are among its tokens"),
            ("image_noise_mask", "pictures to go by are among its tokens"),
        ),
    ),
    "WanTransformer3DModel": Family(
        "Wan 2.1, 2.2",
        "transformer_wan",
        {"blocks": Kind(text=None, tables=(Table("rotary_emb", 1, "image"),))},
        _patched,
    ),
    "AuraFlowTransformer2DModel": Family(
        "AuraFlow",
        "auraflow_transformer_2d",
        {
            "joint_transformer_blocks": Kind(returns=1, attends=_TEXT_IMAGE),
            "single_transformer_blocks": Kind(text=None, attends=_TEXT_IMAGE, joined=True),
        },
        _patched,
        _as_noise,
    ),
    "CogView4Transformer2DModel": Family(
        "CogView4",
        "transformer_cogview4",
        {"transformer_blocks": Kind(returns=0, attends=_TEXT_IMAGE, tables=(Table("image_rotary_emb", 0, "image"),))},
        _patched,
        dense_with=(("attention_mask", "a mask is laid over its tokens"),),
    ),
    "CogVideoXTransformer3DModel": Family(
        "CogVideoX",
        "cogvideox_transformer_3d",
        {"transformer_blocks": Kind(returns=0, attends=_TEXT_IMAGE, tables=(Table("image_rotary_emb", 0, "image"),))},
        _frames_first,
    ),
    "LTXVideoTransformer3DModel": Family(
        "LTX-Video",
        "transformer_ltx",
        {"transformer_blocks": Kind(text=None, tables=(Table("image_rotary_emb", 1, "image"),))},
        _by_sides,
    ),
}
"""By the name of the class."""

UNPRUNABLE = {
    "SanaTransformer2DModel": "each of its blocks has a convolution over the grid, which kept tokens do not fill",
    "SanaVideoTransformer3DModel": "each of its blocks has a convolution over the grid, which kept tokens do not fill",
}
"""Transformers that cannot be pruned, and why."""


def family_of(model: Any) -> Family | None:
    """Return the family of a model, subclasses of its class included; None if it is of none."""
    for kind in type(model).__mro__:
        family = FAMILIES.get(kind.__name__)
        if family is not None and kind.__module__.startswith("diffusers."):
            return family
    return None
