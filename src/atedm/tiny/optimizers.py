"""The optimizers of a training: Muon for all matrices and kernels of what denoises, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class KernelMuon(torch.optim.Muon):
    """Muon (Jordan et al., 2024) that takes the kernels of convolutions too: each as its matrix (out, in * h * w).

    torch's own takes matrices only, and most of a U-Net's weights are kernels.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        """Take contiguous parameters of two or more dimensions, on the device where they stay; options as torch's."""
        self._parameters = list(parameters)
        # Views of the same memory, so that a step on them is a step on the parameters.
        self._matrices = [nn.Parameter(parameter.detach().flatten(1)) for parameter in self._parameters]
        super().__init__(self._matrices, **options)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step by the gradients of the parameters."""
        for parameter, matrix in zip(self._parameters, self._matrices, strict=True):
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        return super().step(closure)  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters."""
        super().zero_grad(set_to_none)
        for parameter in self._parameters:
            parameter.grad = None


def build_optimizers(model: nn.Module, lr: float, muon: bool = True) -> list[torch.optim.Optimizer]:
    """Build the optimizers of what is trained of a `Denoiser`.

    Args:
        model: On the device where it trains.
        lr: Learning rate of both.
        muon: Without it all is left to AdamW.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [p for name, p in trained.items() if muon and not name.startswith("text_encoder") and p.ndim >= 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in trained.values() if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ]
    if matrices:
        optimizers.append(KernelMuon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers
