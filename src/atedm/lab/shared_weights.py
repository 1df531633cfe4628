"""A second U-Net on the same weights, so that one can be patched and the other run beside it."""

import copy

from diffusers import UNet2DConditionModel


def copy_with_shared_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the modules of a U-Net, not its weights: both hold the same tensors."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    copied: UNet2DConditionModel = copy.deepcopy(unet, shared)
    return copied
