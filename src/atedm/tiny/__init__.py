"""The models that ship: the scenes they draw, how they were trained, and the judge of their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from atedm.tiny.objects import FEWER_OBJECTS, OBJECTS


class Shipped(NamedTuple):
    """A model that ships."""

    #: Folder of its weights in this package; judge and CLIP model are in that of `TINY`.
    weights: str
    #: Whether it is the sibling that was distilled to few steps: a LoRA in the same folder.
    few_steps: bool = False
    #: The objects that it draws.
    objects: tuple[str, ...] = tuple(OBJECTS)


TINY = "tiny"
"""Name of the small SDXL."""
SHIPPED = {
    TINY: Shipped("weights"),
    "tiny-turbo": Shipped("weights", few_steps=True),
    "tiny-sd3": Shipped("weights-sd3", objects=FEWER_OBJECTS),
    "tiny-sd3-turbo": Shipped("weights-sd3", few_steps=True, objects=FEWER_OBJECTS),
}
"""The models that ship, by name: a small SDXL and a small SD3, each with a sibling for 4 steps."""


def objects_of(model: str) -> tuple[str, ...]:
    """Return the objects that a model draws, of one that does not ship all there are."""
    return SHIPPED.get(model, SHIPPED[TINY]).objects


def weights_folder(name: str = TINY) -> Path:
    """Return the folder of a model that ships: an ordinary diffusers pipeline.

    Raises:
        FileNotFoundError: If this installation carries no weights.
        KeyError: If no model of this name ships.
    """
    folder = Path(__file__).parent / SHIPPED[name].weights
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"the shipped model is missing from this installation: no {folder / 'model_index.json'}"
        )
    return folder
