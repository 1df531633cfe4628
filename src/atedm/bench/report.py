"""What was timed, on what, and what came out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from atedm.costs.latency import Spread


@dataclass(frozen=True)
class Timed:
    """What one method takes."""

    method: dict[str, Any]
    #: Share of the dense multiply-accumulates, everything that is added counted.
    arithmetic: float
    #: Milliseconds.
    time: Spread
    #: Over dense, each of the same round: what slows the machine for a while slows both.
    ratio: Spread
    #: Bytes of activations at the highest point of a call; None where they were not measured.
    peak: int | None


@dataclass(frozen=True)
class BenchReport:
    """The times of all methods, and everything they depend on."""

    model: str
    #: "step" of the U-Net, of which what lasts for several steps takes its share; or "image", from words to pixels.
    timed: str
    #: "its own" or "random".
    weights: str
    #: (width, height) in pixels.
    size: tuple[int, int]
    batch: int
    guidance: bool
    #: Denoising steps of an image; None where single steps are timed.
    steps: int | None
    dtype: str
    device: str
    processor: str
    threads: int
    repeats: int
    versions: dict[str, str]
    rows: dict[str, Timed]

    def headline(self) -> str:
        """Say in one line what was timed on what."""
        width, height = self.size
        what = "a step" if self.steps is None else f"an image of {self.steps} steps"
        return (
            f"{what} of {self.model}, {width} x {height} pixels, batch {self.batch} "
            f"{'with' if self.guidance else 'without'} guidance, {self.weights} weights in {self.dtype}, "
            f"{self.processor}, {self.threads} thread{'s' if self.threads > 1 else ''}, torch {self.versions['torch']}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        rows = {
            name: {**asdict(row), "time": row.time._asdict(), "ratio": row.ratio._asdict()}
            for name, row in self.rows.items()
        }
        return {**asdict(self), "rows": rows}
