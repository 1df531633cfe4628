"""Arithmetic of ToMe, the peer of the paper, as the ``tomesd`` package does it.

Every layer matches its tokens anew: one of each 2 x 2 cell is a destination, the others are sources, and the share of
sources most alike to a destination is merged into it; results are copied back after each part of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from atedm.config import check_name
from atedm.costs.formula import BlockShape, Macs, layer_macs

#: What runs on merged tokens: self-attention alone, as by default, or with cross-attention and feed-forward, as the
#: paper widens it for SD-XL (supplement B.1).
MERGES = ("everything", "self-attention")
#: Where: at all feature levels, as the paper widens it, or at the highest alone, as by default.
LEVELS = ("all", "highest")


@dataclass(frozen=True)
class ToMe:
    """One setting of ToMe.

    Raises:
        ValueError: If a value is out of its range or a name unknown.
    """

    #: Share of the tokens merged away, from 0 to the 0.75 that ToMe can do.
    ratio: float = 0.5
    #: One of `MERGES`.
    merge: str = "everything"
    #: One of `LEVELS`.
    levels: str = "all"

    def __post_init__(self) -> None:
        """Check every value."""
        if not 0 <= self.ratio <= 0.75:
            raise ValueError(f"ratio must be from 0 to 0.75, the most that ToMe can merge, not {self.ratio!r}")
        check_name("merge", self.merge, MERGES)
        check_name("levels", self.levels, LEVELS)

    def merged(self, shape: BlockShape) -> int:
        """Tokens of a block that are merged away."""
        if self.levels == "highest" and shape.place.level > 1:
            return 0
        return min(int(shape.tokens * self.ratio), shape.tokens - _destinations(shape))


def tome_macs(shape: BlockShape, tome: ToMe) -> Macs:
    """MACs of one attention block for one image with ToMe in each of its layers."""
    n, c = shape.tokens, shape.channels
    merged = tome.merged(shape)
    left = n - merged
    elsewhere = left if tome.merge == "everything" else n
    layer = layer_macs(shape, left, elsewhere, elsewhere)
    if merged:
        destinations = _destinations(shape)
        layer = layer.plus(Macs(matching=(n - destinations) * destinations * c))
    return Macs(linear=2 * n * c * c).plus(layer.times(shape.place.layers))


def tome_step_macs(shapes: Sequence[BlockShape], tome: ToMe) -> Macs:
    """MACs of all attention blocks in one step for one image; every step is alike."""
    return Macs().plus(*(tome_macs(shape, tome) for shape in shapes))


@contextmanager
def with_tomesd(unet: Any, tome: ToMe) -> Iterator[None]:
    """Run a U-Net with ToMe for the length of a ``with`` block, by the package of its authors.

    Raises:
        ImportError: If ``tomesd`` is not installed.
    """
    try:
        import tomesd
    except ImportError as error:
        raise ImportError("ToMe needs the tomesd package: pip install 'atedm[peers]'") from error
    everything = tome.merge == "everything"
    tomesd.apply_patch(
        unet,
        ratio=tome.ratio,
        max_downsample=1 if tome.levels == "highest" else 8,
        merge_attn=True,
        merge_crossattn=everything,
        merge_mlp=everything,
    )
    try:
        yield
    finally:
        tomesd.remove_patch(unet)


def _destinations(shape: BlockShape) -> int:
    height, width = shape.size
    return (height // 2) * (width // 2)
