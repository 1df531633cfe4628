"""What is timed, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from atedm.app.devices import best_device, processor_of, usual_dtype, versions
from atedm.costs.architectures import architecture
from atedm.suits import suits
from atedm.tiny import SHIPPED
from atedm.words import check_whole


@dataclass(frozen=True)
class Setup:
    """A model at one size on one device."""

    model: str
    size: tuple[int, int]  #: (width, height) in pixels.
    batch: int  #: Images at a time.
    guidance: bool  #: Whether the U-Net runs on two of each image.
    dtype: str
    device: str
    repeats: int
    processor: str
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def of(
        cls,
        model: str,
        *,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        guidance: bool | None = None,
        dtype: str | None = None,
        device: str | None = None,
        repeats: int = 5,
    ) -> Setup:
        """Fill in what suits the model and what this machine says of itself.

        By default the size is the model's own, guidance as the model is run, the device the fastest there is, and the
        dtype float32 on the CPU and float16 elsewhere. ``repeats`` rounds count, after one to warm up. Raises a
        `FileNotFoundError` if ``model`` is a folder that is not there, and a `ValueError` if a count is below 1, or a
        size does not suit the model.
        """
        check_whole("batch", batch)
        check_whole("repeats", repeats)
        size = size or (architecture(model).default_size if not Path(model).is_file() else None)
        if size is None:
            raise ValueError("give a --size: a single file does not say what the model was trained for")
        device = device or best_device()
        return cls(
            model,
            size,
            batch,
            suits(model).guidance > 0 if guidance is None else guidance,
            dtype or str(usual_dtype(device)).removeprefix("torch."),
            device,
            repeats,
            processor_of(device),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def call(self) -> dict[str, Any]:
        """Return the arguments of a call of the U-Net but for the timestep, on the device."""
        images = self.batch * (2 if self.guidance else 1)
        return architecture(self.model).call(self.size, images, device=self.device, dtype=self.torch_dtype)

    def has_weights(self) -> bool:
        """Whether the weights are at hand: of the model that ships, of a file, or of a folder that holds them."""
        folder = Path(self.model).expanduser()
        return (
            self.model in SHIPPED
            or folder.is_file()
            or any(any((folder / part).glob("*.safetensors")) for part in ("unet", "transformer"))
        )

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.model}, {self.size[0]} x {self.size[1]} pixels, batch {self.batch} "
            f"{'with' if self.guidance else 'without'} guidance, {self.dtype}, {self.processor}, {self.threads} "
            f"thread{'s' * (self.threads > 1)}, torch {self.versions['torch']}"
        )
