"""Ablations: every choice of both methods, and the controls they are held against, as one configurable `Variant`."""

from atedm.hosts.diffusers_unet import BLOCK_CLASSES
from atedm.lab.ablation.block import AblatedTransformer2DModel
from atedm.lab.ablation.variant import Variant, variant_of

BLOCK_CLASSES[Variant] = AblatedTransformer2DModel

__all__ = ["Variant", "variant_of"]
