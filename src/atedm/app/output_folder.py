"""The folder of a run: its images and its ``run.json``, in place of those of an earlier run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from atedm.app.run_file import MASK, NAME
from atedm.files import save_image, save_json

_NAMES = re.compile(r"(pruned|dense|other|maps)-\d+\.png|comparison\.png")
"""Pictures of a run. Nobody else is likely to use these names."""


class OutputFolder:
    """Writes what a run makes. Until there is an image, an earlier run in the same folder stays whole."""

    def __init__(self, path: Path, content: Callable[[], dict[str, Any]], mask: Image.Image | None = None) -> None:
        """Make the folder if missing; ``content`` gives what ``run.json`` says at the moment."""
        self.path, self.content, self.mask = path, content, mask
        self.is_empty = True
        path.mkdir(parents=True, exist_ok=True)

    def save(self, image: Image.Image, name: str) -> None:
        """Write an image."""
        if self.is_empty:
            self._remove_earlier_run()
            self.save_run_file()
            if self.mask is not None:
                save_image(self.mask, self.path / MASK)
            self.is_empty = False
        save_image(image, self.path / name)

    def save_run_file(self) -> None:
        """Write ``run.json`` as it is now."""
        save_json(self.content(), self.path / NAME)

    def _remove_earlier_run(self) -> None:
        if not (self.path / NAME).exists():
            return  # these are no images of ours
        for file in self.path.iterdir():
            if file.name == MASK or _NAMES.fullmatch(file.name):
                file.unlink()
