"""Very small models with random weights, shaped like the real ones, and what the tests of the patch do with them."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

import atedm
from atedm.tiny.autoencoder import build_autoencoder
from atedm.tiny.text import WIDTH, build_text_encoders, build_tokenizer

TEXT_WIDTH = 2 * WIDTH
EARLY, LATE = 999, 1
"""Timesteps of an early step and of a normal one."""


# --- U-Nets -----------------------------------------------------------------------------------------------------------


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's shape: no attention on the first level, two layers a block on the second, three on the third."""
    shape = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 48),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    return _build(seed, shape | changes)


def small_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's shape with little more than one spared block and one that never is: for what is slow for each of them."""
    shape = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "layers_per_block": 1,
    }
    return sdxl_unet(seed, **(shape | changes))


def sd1_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SD 1.x's shape: one layer a block on all levels but the last, convolutions into and out of the blocks."""
    shape = {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "attention_head_dim": 2,
    }
    return _build(seed, shape | changes)


def _build(seed: int, shape: dict[str, Any]) -> UNet2DConditionModel:
    common = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
    }
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**(common | shape))
    # Sharp attention and strong blocks, so that which tokens are dropped shows in the output.
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            nn.init.normal_(parameter, std=2.5 * parameter.shape[1] ** -0.5)
        elif name.endswith(("to_out.0.weight", "ff.net.2.weight")) or (".attentions." in name and "proj_out" in name):
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return unet.eval()


def inputs(
    unet: UNet2DConditionModel, size: tuple[int, int] = (16, 16), batch: int = 2, words: int = 7, seed: int = 1
) -> dict[str, Any]:
    """What one call of a U-Net takes besides the timestep, in the U-Net's own precision."""
    generator = torch.Generator().manual_seed(seed)
    device = unet.device if unet.device.type == "cuda" else torch.device("cpu")  # an offloaded U-Net is on neither

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, unet.dtype)

    call = {"sample": normal(batch, 4, *size), "encoder_hidden_states": normal(batch, words, TEXT_WIDTH)}
    if unet.config.addition_embed_type == "text_time":
        times = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]]).repeat(batch, 1)
        call["added_cond_kwargs"] = {"text_embeds": normal(batch, WIDTH), "time_ids": times.to(device)}
    return call


@torch.no_grad()
def run(unet: Any, timestep: Any = LATE, *, size: tuple[int, int] = (16, 16), batch: int = 2, **changes: Any) -> Tensor:
    """One call of a U-Net."""
    plain = getattr(unet, "_orig_mod", unet)
    return unet(**(inputs(plain, size, batch) | {"timestep": timestep} | changes)).sample


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference."""
    return float((a - b).abs().max())


# --- pipelines --------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows a few dozen words."""
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sdxl_pipeline(unet: UNet2DConditionModel | None = None, kind: Any = StableDiffusionXLPipeline, **parts: Any) -> Any:
    """A whole pipeline, text-to-image by default; 64 px images have 16 x 16 latents."""
    torch.manual_seed(0)
    text_encoder, text_encoder_2 = build_text_encoders(tokenizer())
    pipe = kind(
        vae=build_autoencoder().eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=sdxl_unet() if unet is None else unet,
        scheduler=scheduler(),
        add_watermarker=False,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int = 0, **changes: Any) -> Tensor:
    """Draw from a seed and give the latents."""
    options = {"prompt": "a duck", "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    if "image" not in changes and "height" not in changes:
        options |= {"height": 64, "width": 64}
    return pipe(**(options | changes), generator=torch.Generator().manual_seed(seed)).images


# --- watching ---------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What one call of a patched U-Net did."""

    #: Index of the step; None if nothing was pruned.
    step: int | None
    #: Tokens left at the end, by block.
    kept: dict[str, int]
    #: Importance where tokens are dropped first, by block.
    importance: dict[str, Tensor]

    def is_early(self, summary: atedm.PatchSummary) -> bool:
        """Whether the spared blocks were spared; all of them or none."""
        left_alone = summary.pruned - self.kept.keys()
        assert left_alone in (frozenset(), summary.spared)
        return bool(left_alone)


@contextmanager
def watched(unet: UNet2DConditionModel) -> Iterator[list[Call]]:
    """Note every call of a patched U-Net."""
    calls: list[Call] = []
    current: list[atedm.Observation] = []

    def close(*_: Any) -> None:
        importance = {seen.block: seen.importance for seen in reversed(current)}
        kept = {seen.block: seen.keep.shape[1] for seen in current}
        calls.append(Call(current[0].step if current else None, kept, importance))
        current.clear()

    hook = unet.register_forward_hook(close)
    try:
        with atedm.observed(unet, current.append):
            yield calls
    finally:
        hook.remove()


def importance(unet: UNet2DConditionModel, timestep: Any = LATE, **changes: Any) -> dict[str, Tensor]:
    """Importance in one call, by block."""
    with watched(unet) as calls:
        run(unet, timestep, **changes)
    return calls[0].importance


def snapshot(unet: nn.Module) -> dict[str, Any]:
    """Everything that a patch could have touched: classes, attributes and hooks of all modules."""

    def identity(value: Any) -> Any:
        return {key: id(entry) for key, entry in value.items()} if isinstance(value, dict) else id(value)

    return {
        name: (type(module), {key: identity(value) for key, value in vars(module).items()})
        for name, module in unet.named_modules()
    }


def each_layer(unet: UNet2DConditionModel, change: Callable[[nn.Module], None]) -> None:
    """Do something to every transformer layer."""
    for module in unet.modules():
        for layer in getattr(module, "transformer_blocks", ()):
            change(layer)
