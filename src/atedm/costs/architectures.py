"""U-Nets by name, without weights: their public configs, built on the meta device, where nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from atedm.hosts.unet_spans import find_unet
from atedm.suits import TINY, suits
from atedm.tiny import weights_folder
from atedm.words import check_name, is_whole

_CONFIGS = Path(__file__).parent / "unets"
WORDS = 77
"""Text tokens assumed where a model does not say; the share they have is small."""


@dataclass(frozen=True)
class Named:
    """A model whose U-Net config ships with the package."""

    config: str
    #: Pixels a side it was trained for.
    side: int
    #: Whether it is run with guidance, two U-Net calls an image.
    guidance: bool = True


NAMED = {
    "sdxl": Named("sdxl.json", 1024),
    "sdxl-turbo": Named("sdxl.json", 512, guidance=False),
    "sd15": Named("sd15.json", 512),
    "sd21": Named("sd21.json", 768),
}


@dataclass(frozen=True)
class Architecture:
    """A U-Net's sizes and what one call of it is given."""

    name: str
    config: dict[str, Any] = field(repr=False)
    #: (width, height) in pixels it was trained for.
    default_size: tuple[int, int]
    #: Pixels a side that one latent stands for.
    factor: int
    #: Whether it is run with guidance.
    guidance: bool
    #: Text tokens of a caption.
    words: int = WORDS

    def latents(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (height, width) of the latents of an image of ``size`` (width, height) pixels.

        Raises:
            ValueError: If these are no two sides, or one is no multiple of the pixels that one latent stands for.
        """
        try:
            width, height = size or self.default_size
        except (TypeError, ValueError):
            raise ValueError(f"size must be (width, height) in pixels, not {size!r}") from None
        for name, side in (("width", width), ("height", height)):
            if not is_whole(side) or side < self.factor or side % self.factor:
                raise ValueError(
                    f"{name} must be a multiple of {self.factor} pixels for {self.name}, one latent each, not {side}"
                )
        return height // self.factor, width // self.factor

    def on_meta(self) -> UNet2DConditionModel:
        """Build the U-Net without weights.

        Raises:
            ValueError: If diffusers cannot build a U-Net of this config.
        """
        try:
            with torch.device("meta"):
                return UNet2DConditionModel.from_config(self.config).eval()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot build the U-Net of {self.name}: {error}") from error

    def call(
        self,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Return the arguments of one call of the U-Net but for the timestep: noise, drawn from ``seed``.

        Args:
            size: (width, height) in pixels; by default what the model was trained for.
            batch: Images, those of guidance counted.
            device: Where to put them; on the meta device they have sizes only.
            dtype: Any floating dtype.
            seed: Of the noise.
        """
        generator = None if torch.device(device).type == "meta" else torch.Generator("cpu").manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            if generator is None:
                return torch.empty(*shape, device=device, dtype=dtype)
            return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

        config = self.config
        width = config.get("encoder_hid_dim") or config.get("cross_attention_dim", 1280)
        call: dict[str, Any] = {
            "sample": noise(batch, config.get("in_channels", 4), *self.latents(size)),
            "encoder_hidden_states": noise(batch, self.words, width),
        }
        if config.get("addition_embed_type") == "text_time":
            # Six sizes and crops in SDXL, five in its refiner; only the sum of both widths matters.
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            call["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": noise(batch, 6)}
        kind = config.get("class_embed_type")
        if kind is None and config.get("num_class_embeds") is not None:
            call["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
        elif kind == "timestep":
            call["class_labels"] = noise(batch)
        elif kind == "identity":
            call["class_labels"] = noise(batch, 4 * config["block_out_channels"][0])
        elif kind is not None:  # projections of any vector
            call["class_labels"] = noise(batch, config["projection_class_embeddings_input_dim"])
        return call


def run_once(unet: Any, call: Mapping[str, Any], timestep: int) -> Any:
    """Call a U-Net as pipelines do: the sample by place, where other patches look for it."""
    arguments = dict(call)
    return unet(arguments.pop("sample"), timestep, **arguments)


def architecture(model: Any) -> Architecture:
    """Find the U-Net that ``model`` names.

    Args:
        model: One of "sdxl", "sdxl-turbo", "sd15", "sd21", "tiny"; a diffusers folder or a hub id, of which only the
            configs are read; a pipeline, or a U-Net.

    Raises:
        FileNotFoundError: If a local folder is not there.
        TypeError: If a pipeline has no U-Net.
        ValueError: If the name is unknown or there is no U-Net config.
    """
    if not isinstance(model, str | Path):
        return _of_object(model)
    name = str(model)
    if name in NAMED:
        known = NAMED[name]
        config = json.loads((_CONFIGS / known.config).read_text())
        return Architecture(name, config, (known.side, known.side), 8, known.guidance)
    folder = weights_folder() if name == TINY else Path(name).expanduser()
    if folder.is_dir():
        return _of_folder(name, folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no folder {name!r}")
    if "/" not in name:
        check_name("model", name, [*NAMED, TINY])
    return _of_hub(name)


def _of_object(target: Any) -> Architecture:
    unet = find_unet(target)
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"costs are counted for a U-Net, not for a {type(unet).__name__}; give a rate there")
    factor = getattr(target, "vae_scale_factor", 8)
    text = getattr(getattr(target, "text_encoder", None), "config", None)
    words = getattr(text, "max_position_embeddings", WORDS)
    return _architecture(type(target).__name__, dict(unet.config), factor, words)


def _of_folder(name: str, folder: Path) -> Architecture:
    file = next((f for f in (folder / "unet" / "config.json", folder / "config.json") if f.exists()), None)
    if file is None:
        raise ValueError(f"{name} has no U-Net: neither unet/config.json nor config.json is there")
    vae, text = (folder / part / "config.json" for part in ("vae", "text_encoder"))
    words = _read(text).get("max_position_embeddings", WORDS) if text.exists() else WORDS
    return _architecture(name, _read(file), _factor(_read(vae)) if vae.exists() else 8, words)


def _of_hub(name: str) -> Architecture:
    try:
        config = UNet2DConditionModel.load_config(name, subfolder="unet")
    except OSError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the U-Net config of {name!r} from the hub: {first}") from error
    return _architecture(name, dict(config), 8)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no config: it holds a {type(content).__name__}")
    return content


def _architecture(name: str, config: dict[str, Any], factor: int, words: int = WORDS) -> Architecture:
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{name} holds a {kind}; atedm prunes the attention blocks of a UNet2DConditionModel")
    side = config.get("sample_size") or 64
    height, width = (side, side) if isinstance(side, int) else side
    return Architecture(name, config, (width * factor, height * factor), factor, suits(name).guidance > 0, words)


def _factor(vae: dict[str, Any]) -> int:
    """Pixels a side that one latent stands for."""
    if "scaling_layers" in vae or vae.get("_class_name") == "AutoencoderTiny":
        return int(2 ** (len(vae["encoder_block_out_channels"]) - 1))
    return int(2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1))
