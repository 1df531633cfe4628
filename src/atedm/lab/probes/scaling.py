"""How cost grows with the size of the image, model by model (supplement Fig. 2)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from atedm.app.equal_cost import can_prune
from atedm.costs.architectures import architecture
from atedm.costs.counting import count_dense
from atedm.costs.spans import span_shape, step_macs
from atedm.hosts.unet_spans import find_spans
from atedm.lab.progress import Progress, silent
from atedm.method.contract import Method


@dataclass(frozen=True)
class Point:
    """T MACs of one image's step, guidance counted, by torch's count."""

    model: str
    side: int  #: Pixels of a square image.
    attention: float
    resnet: float
    other: float
    #: Attention in a normal pruned step, overheads included; None where the method has nothing to prune.
    attention_pruned: float | None

    @property
    def attention_share(self) -> float:
        """Share of the attention blocks in the dense step."""
        return self.attention / (self.attention + self.resnet + self.other)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"attention_share": round(self.attention_share, 4)}


def scaling(models: Sequence[str], sides: Sequence[int], method: Method, *, progress: Progress = silent) -> list[Point]:
    """Count models at sizes, with a method beside the dense cost. Nothing is computed and no weights are read.

    ``models`` are as `atedm.costs.architectures.architecture` takes them, ``sides`` pixels of square images. Each is
    counted once, sizes from the smallest. Raises a `ValueError` if a model is unknown or a size does not divide, before
    anything is counted.
    """
    architectures = [architecture(model) for model in dict.fromkeys(models)]
    sides = sorted(set(sides))
    for arch in architectures:
        for side in sides:
            arch.latents((side, side))
    points: list[Point] = []
    for arch in architectures:
        unet = arch.on_meta()
        tera = (2 if arch.guidance else 1) / 1e12
        places, has_something = [place for place, _ in find_spans(unet).values()], can_prune(unet, method)
        for side in sides:
            progress(f"{arch.name} at {side} px", len(points), len(architectures) * len(sides))
            counted = count_dense(arch, (side, side))
            shapes = [span_shape(unet, place, arch.latents((side, side)), arch.words) for place in places]
            resnet = sum(counted.resnets.values())
            attention, other = counted.total - counted.rest, counted.rest - resnet
            pruned = tera * step_macs(shapes, method).exact if has_something else None
            points.append(Point(arch.name, side, tera * attention, tera * resnet, tera * other, pruned))
    return points
