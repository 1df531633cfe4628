"""What to make, checked before any work, and what was made."""

from __future__ import annotations

from dataclasses import dataclass

from atedm.checks import is_number, is_whole
from atedm.config import PruningConfig


@dataclass(frozen=True)
class Request:
    """What to make. ``width`` and ``height`` are pixels; None leaves a choice to the pipeline."""

    prompts: tuple[str, ...]
    config: PruningConfig
    steps: int = 50
    guidance: float = 3.0
    width: int | None = None
    height: int | None = None
    seed: int = 0
    #: What to show beside it where images are compared.
    beside: PruningConfig | None = None
    #: A picture, white where nothing is to be dropped.
    protect: str | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if not self.prompts or any(not isinstance(prompt, str) or not prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt is empty; give a line of text for each image")
        for prompt in self.prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt {prompt!r} is not text in UTF-8") from error
        if not is_whole(self.steps) or self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps!r}")
        if not is_number(self.guidance) or not 0 <= self.guidance < 1000:
            raise ValueError(f"guidance must be 0 or more and below 1000, not {self.guidance!r}")
        if not is_whole(self.seed) or not -(2**63) <= self.seed < 2**63 - len(self.prompts):
            raise ValueError(f"seed must be a whole number of 63 bits and a sign, not {self.seed!r}")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (not is_whole(side) or side < 32 or side % 8):
                raise ValueError(f"{name} must be a multiple of 8 pixels from 32 up, not {side!r}")
        if self.protect is not None and not isinstance(self.protect, str):
            raise ValueError(f"protect must be the name of a picture, not {self.protect!r}")


@dataclass(frozen=True)
class Made:
    """One image and how it was made."""

    file: str
    prompt: str
    seed: int
    seconds: float
    kept_share: float
    dense_file: str | None = None
    dense_seconds: float | None = None
    psnr_to_dense: float | None = None
    #: The same by ``request.beside``.
    beside: Made | None = None
