"""A tiny SDXL of our own: the scenes it draws, how it was trained, and the judge of its pictures."""

from __future__ import annotations

from pathlib import Path


def weights_folder() -> Path:
    """Return the folder of the model that ships: an ordinary diffusers pipeline.

    Raises:
        FileNotFoundError: If this installation carries no weights.
    """
    folder = Path(__file__).parent / "weights"
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(
            f"the shipped model is missing from this installation: no {folder / 'model_index.json'}"
        )
    return folder
