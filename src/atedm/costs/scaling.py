"""How cost grows with the size of the image, model by model (supplement Fig. 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from atedm.config import PruningConfig
from atedm.costs.architectures import architecture
from atedm.costs.counting import count_macs
from atedm.costs.formula import Macs, block_macs
from atedm.patching.summary import block_shape
from atedm.patching.survey import choose_blocks, find_blocks

MODELS = ("sdxl", "sd21", "sd15")
SIDES = (512, 768, 1024, 1280, 1536, 1792, 2048)


@dataclass(frozen=True)
class Point:
    """T MACs of one image's step, guidance counted, by torch's count."""

    model: str
    #: Pixels of a square image.
    side: int
    attention: float
    resnet: float
    other: float
    #: Attention in a normal pruned step, overheads included; None where the config has nothing to prune.
    attention_pruned: float | None

    @property
    def attention_share(self) -> float:
        """Share of the attention blocks in the dense step."""
        return self.attention / (self.attention + self.resnet + self.other)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"attention_share": round(self.attention_share, 4)}


def scaling(
    models: Sequence[str] = MODELS,
    sides: Sequence[int] = SIDES,
    config: PruningConfig | None = None,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> list[Point]:
    """Count models at sizes. Nothing is computed and no weights are read.

    Args:
        models: As `atedm.costs.architectures.architecture`; each is counted once.
        sides: Pixels of square images, counted from the smallest.
        config: What pruning is shown beside the dense cost.
        progress: Told of each model and size before it is counted.

    Raises:
        ValueError: If a model is unknown or a size does not divide, before anything is counted.
    """
    config = config or PruningConfig()
    architectures = [architecture(model) for model in dict.fromkeys(models)]
    sides = sorted(set(sides))
    for arch in architectures:
        for side in sides:
            arch.latents((side, side))
    points = []
    for arch in architectures:
        unet = arch.on_meta()
        images = 2 if arch.guidance else 1
        tera = images / 1e12
        blocks = find_blocks(unet)
        try:
            chosen = frozenset(choose_blocks(blocks, config))
        except ValueError:
            chosen = frozenset()
        for side in sides:
            if progress is not None:
                progress(arch.name, side)
            counted = count_macs(unet, arch.call((side, side)), 0)
            shapes = [block_shape(unet, place, arch.latents((side, side)), arch.words) for place, _ in blocks.values()]
            pruned = Macs().plus(*(block_macs(s, config if s.place.name in chosen else None) for s in shapes))
            resnet = sum(counted.resnets.values())
            points.append(
                Point(
                    arch.name,
                    side,
                    attention=round(tera * (counted.total - counted.rest), 6),
                    resnet=round(tera * resnet, 6),
                    other=round(tera * (counted.rest - resnet), 6),
                    attention_pruned=round(tera * pruned.exact, 6) if chosen else None,
                )
            )
    return points
