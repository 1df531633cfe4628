"""Fetch the pictures of the objects: the npm package of Microsoft's Fluent Emoji, by npm or over HTTPS."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from atedm.files import written_whole
from atedm.tiny.objects import OBJECTS
from atedm.tiny.rendering import Atlas

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
"""MIT licence; pictures by Microsoft (Fluent Emoji, MIT). 15.8 MB, fetched for training and never shipped."""
ObjectsArchive = Annotated[
    Path | None, typer.Option("--objects-archive", help="The npm package of the objects; fetched by default.")
]
"""How a command is given the package."""
_URL = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
"""Of the package's archive."""


def objects_folder() -> Path:
    """Return the folder that keeps the pictures between runs, in torch's cache: ``TORCH_HOME`` moves it."""
    return Path(torch.hub.get_dir()) / "atedm"


def load_atlas(folder: Path, archive: Path | None = None) -> Atlas:
    """Return the pictures of all objects; fetched when they are first asked for, and kept in ``folder``.

    Args:
        folder: Made if missing.
        archive: The package's archive, where it is at hand; by default ``npm pack`` or HTTPS fetches it.

    Raises:
        FileNotFoundError: If it cannot be fetched.
        ValueError: If the archive is another one.
    """
    file = folder / f"objects-{len(OBJECTS)}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _read(_fetched(folder) if archive is None else archive)
        with written_whole(file) as partial:
            save_file({"pictures": (pictures * 255).round().to(torch.uint8)}, partial)
    return Atlas.of(load_file(file)["pictures"].float() / 255)


def _fetched(folder: Path) -> Path:
    if shutil.which("npm"):
        packed = subprocess.run(
            ["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True, check=False
        )
        if packed.returncode == 0:
            return folder / packed.stdout.strip().splitlines()[-1]
    archive = folder / _URL.rpartition("/")[2]
    try:
        torch.hub.download_url_to_file(_URL, str(archive), SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"cannot fetch the pictures of the objects, {PACKAGE}, by npm or from {_URL}: {error}; "
            f"a connection is needed once, afterwards they are kept in {folder}"
        ) from error
    return archive


def _read(archive: Path) -> Tensor:
    """(objects, 4, 256, 256) in [0, 1], from the archive."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive} is not {PACKAGE}: its SHA-256 is {found}")
    pictures = []
    with tarfile.open(archive) as tar:
        for code in OBJECTS.values():
            member = tar.extractfile(f"package/assets/{code}.webp")
            assert member is not None
            with Image.open(member) as picture:
                pixels = np.array(picture.convert("RGBA").resize((256, 256), Image.Resampling.LANCZOS))
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return torch.stack(pictures)
