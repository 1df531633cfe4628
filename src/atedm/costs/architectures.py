"""Models by name, without weights: their public configs, built on the meta device, where nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from atedm.costs.transformer_calls import PACKED, VIDEO, transformer_call, words_of
from atedm.hosts.dit_families import FAMILIES
from atedm.hosts.models import find_model
from atedm.hosts.unet_spans import PRUNABLE
from atedm.suits import suits
from atedm.tiny import SHIPPED, weights_folder
from atedm.tiny.transformer import CaptionOnlySD3Pipeline
from atedm.words import check_name, is_whole

_CONFIGS = Path(__file__).parent / "configs"
_UNET = "UNet2DConditionModel"
WORDS = 77
"""Text tokens assumed where a model does not say; the share they have is small."""


NAMED = (
    *("sdxl", "sdxl-turbo", "sd15", "sd21"),
    *("flux", "sd35-large", "sd35-medium", "qwen-image", "z-image", "pixart-sigma"),
)
"""Models whose configs ship with the package."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a U-Net or a transformer, and what one call of it is given."""

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

    @property
    def is_transformer(self) -> bool:
        """Whether it is a transformer of a known family."""
        return self.config.get("_class_name") in FAMILIES

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

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (h, w) of the image tokens of a transformer, two latents a side each in those that cut patches.

        Raises:
            ValueError: As `latents`, or if a side is odd in latents.
        """
        height, width = self.latents(size)
        patch = self.config.get("patch_size", 2)
        if self.config["_class_name"] in PACKED:  # 2 x 2 latents make a token before the model
            patch = 2
        elif not isinstance(patch, int):
            patch = patch[-1]
        if height % patch or width % patch:
            raise ValueError(f"sides must be multiples of {patch * self.factor} pixels for {self.name}")
        return height // patch, width // patch

    def on_meta(self) -> Any:
        """Build the model without weights.

        Raises:
            ValueError: If diffusers cannot build a model of this config.
        """
        kind = getattr(diffusers, self.config["_class_name"]) if self.is_transformer else UNet2DConditionModel
        try:
            with torch.device("meta"):
                return kind.from_config(self.config).eval()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot build the model of {self.name}: {error}") from error

    def call(
        self,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Return the arguments of one call: noise, always the same. Those of a U-Net lack the timestep.

        Args:
            size: (width, height) in pixels; by default what the model was trained for.
            batch: Images, those of guidance counted.
            device: Where to put them; on the meta device they have sizes only.
            dtype: Any floating dtype.
        """
        generator = None if torch.device(device).type == "meta" else torch.Generator("cpu").manual_seed(0)

        def noise(*shape: int) -> Tensor:
            if generator is None:
                return torch.empty(*shape, device=device, dtype=dtype)
            return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

        config = self.config
        if self.is_transformer:
            return transformer_call(config, self.grid(size), batch, self.words, noise, device=device)
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
    """Find the U-Net or the transformer that ``model`` names.

    Args:
        model: One of `NAMED` or of the models that ship; a diffusers folder or a hub id, of which only the configs are
            read; a pipeline, or a model.

    Raises:
        FileNotFoundError: If a local folder is not there.
        TypeError: If a pipeline has no such model.
        ValueError: If the name is unknown or there is no config of such a model.
    """
    if not isinstance(model, str | Path):
        return _of_object(model)
    name = str(model)
    if name in NAMED:
        found = _architecture(name, _read(_CONFIGS / f"{name}.json"), 8)
        return replace(found, guidance=False) if name == "z-image" else found  # which is distilled to run without
    folder = weights_folder(name) if name in SHIPPED else Path(name).expanduser()
    if folder.is_dir():
        return _of_folder(name, folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no folder {name!r}")
    if "/" not in name:
        check_name("model", name, [*NAMED, *SHIPPED])
    return _of_hub(name)


def _of_object(target: Any) -> Architecture:
    model = find_model(target)
    if isinstance(model, PRUNABLE) and not isinstance(model, UNet2DConditionModel):
        raise TypeError(f"costs are counted for whole models, not for a {type(model).__name__}; give a rate there")
    factor = getattr(target, "vae_scale_factor", 8)
    text = getattr(getattr(target, "text_encoder", None), "config", None)
    words = getattr(text, "max_position_embeddings", WORDS)
    kinds = (kind.__name__ for kind in type(model).__mro__)  # a subclass costs what its class does
    config = dict(model.config) | {"_class_name": next((kind for kind in kinds if kind in FAMILIES), _UNET)}
    return _architecture(type(target).__name__, config, factor, words, type(target).__name__)


def _of_folder(name: str, folder: Path) -> Architecture:
    files = [folder / part / "config.json" for part in ("unet", "transformer", ".")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise ValueError(
            f"{name} has no model: neither unet/config.json nor transformer/config.json nor config.json is there"
        )
    index, vae, text = (folder / part for part in ("model_index.json", "vae/config.json", "text_encoder/config.json"))
    words = _read(text).get("max_position_embeddings", WORDS) if text.exists() else WORDS
    pipeline = _read(index).get("_class_name", "") if index.exists() else ""
    return _architecture(name, _read(file), _factor(_read(vae)) if vae.exists() else 8, words, pipeline)


def _of_hub(name: str) -> Architecture:
    for part in ("unet", "transformer"):
        try:
            return _architecture(name, dict(UNet2DConditionModel.load_config(name, subfolder=part)), 8)
        except OSError as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(f"cannot read the config of {name!r} from the hub: {first}")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no config: it holds a {type(content).__name__}")
    return content


def _architecture(
    name: str, config: dict[str, Any], factor: int, words: int = WORDS, pipeline: str = ""
) -> Architecture:
    kind = config.get("_class_name", _UNET)
    if kind != _UNET and kind not in FAMILIES:
        raise ValueError(
            f"{name} holds a {kind}; atedm prunes a UNet2DConditionModel, or one of these transformers: "
            f"{', '.join(FAMILIES)}"
        )
    if kind in FAMILIES:
        if pipeline != CaptionOnlySD3Pipeline.__name__:  # whose text is CLIP's alone
            words = words_of(kind)
        side = config.get("sample_size") or ((480 // factor, 832 // factor) if kind in VIDEO else 1024 // factor)
    else:
        side = config.get("sample_size") or 64
    height, width = (side, side) if isinstance(side, int) else side
    guidance = suits(name).guidance > 0 and not config.get("guidance_embeds")  # else it is in one call
    return Architecture(name, config, (width * factor, height * factor), factor, guidance, words)


def _factor(vae: dict[str, Any]) -> int:
    """Pixels a side that one latent stands for."""
    if "scaling_layers" in vae or vae.get("_class_name") == "AutoencoderTiny":
        return int(2 ** (len(vae["encoder_block_out_channels"]) - 1))
    return int(2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1))
