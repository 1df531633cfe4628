"""A U-Net with random weights, for timing: how long a step takes does not depend on what the weights are."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from atedm.costs.architectures import Architecture

_NOISE = 1_048_573
"""Length of the noise. It is a prime, so that no row of a weight is a whole share of it and no two rows are alike."""


@torch.no_grad()
def random_unet(
    arch: Architecture, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> UNet2DConditionModel:
    """Build a U-Net on its device whose activations stay in the range of a trained one.

    Weights are normal with variance one over the fan-in, norms are the identity, biases are zero: nothing overflows in
    any dtype, and no denormal numbers slow it down. The same seed gives the same weights on every device. Raises a
    `ValueError` if diffusers cannot build it.
    """
    # The method of torch: that of diffusers warns of modules to be kept in float32, of which a U-Net has none.
    unet = nn.Module.to(arch.on_meta(), dtype).to_empty(device=device)
    # One million numbers, repeated: drawing 2.6 billion takes minutes on a CPU, and products of matrices take as long
    # for weights that repeat themselves.
    noise = torch.randn(_NOISE, generator=torch.Generator("cpu").manual_seed(seed)).to(device, dtype)
    ring = torch.cat([noise, noise])
    for index, (name, parameter) in enumerate(unet.named_parameters()):
        if parameter.ndim > 1:
            start = index * 7919 % _NOISE  # or all weights would begin alike
            pattern = ring[start : start + _NOISE] * parameter[0].numel() ** -0.5
            times = -(-parameter.numel() // len(pattern))
            parameter.view(-1).copy_(pattern.repeat(times)[: parameter.numel()])
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for buffer in unet.buffers():
        buffer.zero_()
    return unet
