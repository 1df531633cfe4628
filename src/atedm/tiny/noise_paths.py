"""The ways from a picture to noise that the models are trained on, and what a model's output says on them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from atedm.tiny.data import Batch
from atedm.tiny.features import distance
from atedm.tiny.unet import build_scheduler

CAPTION_DROPOUT = 0.1
"""Share of the pictures that are learned without their caption, for guidance."""


class NoisePath(ABC):
    """``noisy = signal * picture + sigma * noise``, with shares that depend on the time."""

    @abstractmethod
    def draw_times(self, count: int, device: torch.device) -> Tensor:
        """Draw (count,) times to train on: more of the noisy ones, where objects and places are decided."""

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """Cut the way into steps: (steps + 1,) times that ascend from no noise to nothing but noise."""

    @abstractmethod
    def shares(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and sigma at times (B,), each (B, 1, 1, 1)."""

    @abstractmethod
    def target(self, picture: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what the model is to say, (B, C, h, w)."""

    @abstractmethod
    def read(self, noisy: Tensor, output: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the picture and the noise that an output stands for, each (B, C, h, w)."""

    def noised(self, picture: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the noisy picture at times (B,)."""
        signal, sigma = self.shares(times)
        return signal * picture + sigma * noise


class VPath(NoisePath):
    """The U-Net's schedule: ``v = signal * noise - sigma * picture``. Times are whole, 0 to 999; -1 has no noise."""

    def __init__(self, device: torch.device) -> None:
        self._alphas = build_scheduler().alphas_cumprod.to(device)

    def draw_times(self, count: int, device: torch.device) -> Tensor:  # noqa: D102
        return (1000 * torch.rand(count, device=device) ** 0.6).long().clamp(max=999)

    def grid(self, steps: int) -> Tensor:  # noqa: D102
        return torch.linspace(-1, 999, steps + 1, device=self._alphas.device).round().long()

    def shares(self, times: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        a = torch.where(times < 0, 1.0, self._alphas[times.clamp_min(0)])[:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def target(self, picture: Tensor, noise: Tensor, times: Tensor) -> Tensor:  # noqa: D102
        signal, sigma = self.shares(times)
        return signal * noise - sigma * picture

    def read(self, noisy: Tensor, output: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        signal, sigma = self.shares(times)
        return signal * noisy - sigma * output, sigma * noisy + signal * output


class FlowPath(NoisePath):
    """Rectified flow: straight lines, and ``velocity = noise - picture``. Times are 1000 times sigma."""

    def __init__(self, device: torch.device, shift: float) -> None:
        self._device, self._shift = device, shift

    def draw_times(self, count: int, device: torch.device) -> Tensor:  # noqa: D102
        return 1000 * torch.sigmoid(torch.randn(count, device=device) + 0.4)

    def grid(self, steps: int) -> Tensor:  # noqa: D102
        sigma = torch.linspace(0, 1, steps + 1, device=self._device)
        return 1000 * self._shift * sigma / (1 + (self._shift - 1) * sigma)

    def shares(self, times: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        sigma = (times / 1000)[:, None, None, None]
        return 1 - sigma, sigma

    def target(self, picture: Tensor, noise: Tensor, times: Tensor) -> Tensor:  # noqa: D102
        return noise - picture

    def read(self, noisy: Tensor, output: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        signal, sigma = self.shares(times)
        return noisy - sigma * output, noisy + signal * output


def training_loss(model: nn.Module, scenes: Batch, path: NoisePath) -> Tensor:
    """Mean square of the error of a `Denoiser` or a `FlowDenoiser` at random times of its path.

    Where the scenes come with features of a teacher, the distance of the model's to these is added.
    """
    picture, ids, sizes, features = scenes
    said: list[Tensor] = []
    times = path.draw_times(len(picture), picture.device)
    noise = torch.randn_like(picture)
    keep = (torch.rand(len(picture), device=picture.device) >= CAPTION_DROPOUT).float()
    with torch.autocast(picture.device.type, torch.bfloat16):
        output = model(path.noised(picture, noise, times), times, ids, keep, sizes, *([said] if features else []))
    error: Tensor = output.float() - path.target(picture, noise, times)
    return error.square().mean() + distance(said, features)
