"""The shapes model's U-Net: SDXL's topology, small."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from atedm.tiny.pictures.unet import small_sdxl
from atedm.tiny.text import WIDTH


def build_unet() -> UNet2DConditionModel:
    """Build the untrained U-Net: A2 and A4 for SDXL's A2 and A10; at 128 px its levels have 1024, 256 and 64 tokens."""
    return small_sdxl(sample_size=32, channels=(32, 64, 96), layers=(1, 2, 4), heads=(1, 2, 3), text_width=WIDTH)
