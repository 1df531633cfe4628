"""What to make, checked before any work, and what was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atedm.method.contract import Method
from atedm.method.matched import Matched
from atedm.plans.plan import Plan
from atedm.words import check_whole, is_number, is_whole


@dataclass(frozen=True)
class Request:
    """What to make.

    Raises a `ValueError` if a value is out of its range.
    """

    prompts: tuple[str, ...]
    method: Method
    steps: int = 50
    guidance: float = 3.0
    #: In pixels; None leaves it to the pipeline.
    width: int | None = None
    height: int | None = None
    #: Seed of the first image; each next one has one more.
    seed: int = 0
    #: Another method to show beside it where images are compared.
    other: Method | None = None
    #: File of a picture, white where nothing is dropped.
    protect: str | None = None
    #: Sets the method, its steps and more; then ``method`` and ``steps`` are the plan's.
    plan: Plan | None = None

    @classmethod
    def by_plan(cls, prompts: tuple[str, ...], plan: Plan, **others: Any) -> Request:
        """Return a request for images by a plan; ``method`` is `Matched(rate=0)` where it drops no token."""
        method = Matched(rate=0.0) if plan.method is None else plan.method
        return cls(prompts, method, plan.steps, plan=plan, **others)

    @property
    def dense_steps(self) -> int:
        """Steps of a dense image beside it: as many, or those that the plan stands for."""
        steps = None if self.plan is None else self.plan.found.get("dense_steps")
        return self.steps if steps is None else int(steps)

    def __post_init__(self) -> None:
        if not self.prompts or any(not isinstance(prompt, str) or not prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt is empty; give a line of text for each image")
        for prompt in self.prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt {prompt!r} is not text in UTF-8") from error
        check_whole("steps", self.steps)
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
class ImageResult:
    """One image and how it was made."""

    file: str
    prompt: str
    seed: int
    seconds: float
    #: Mean share of tokens left at the end of a pruned block.
    kept_share: float
    dense_file: str | None = None
    dense_seconds: float | None = None
    #: Distance to the dense image, in dB.
    psnr_to_dense: float | None = None
    #: The same image by ``request.other``.
    other: ImageResult | None = None
