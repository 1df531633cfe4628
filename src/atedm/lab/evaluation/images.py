"""Draw every prompt with one method into a folder: a run that can be stopped, resumed and shared out.

Image i always starts from the noise of seed ``seed + i``, and images are drawn in fixed groups. So it does not matter
how often a run was stopped, how many processes it was shared among, or whether more were asked for later. Only the last
group may be smaller. Where fewer images are asked for later, those of a group that is cut are kept.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atedm.files import read_json, remove_partials, save_image, save_json
from atedm.lab.evaluation.prompts import Prompt
from atedm.lab.extra import optional
from atedm.lab.methods.candidates import Candidate
from atedm.words import check_whole

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Drawing:
    """What is the same for every method.

    Raises a `ValueError` if a value is out of its range.
    """

    model: str = "tiny"
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    batch: int = 10  #: Images drawn at once.
    width: int | None = None  #: In pixels; None leaves them to the pipeline.
    height: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_whole("steps", self.steps)
        check_whole("batch", self.batch)
        if not 0 <= self.guidance < 1000:
            raise ValueError(f"guidance must be 0 or more and below 1000, not {self.guidance}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be 0 or more and below 2^62, not {self.seed}")

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height), or None where the pipeline chooses."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline but for prompts, steps and noise."""
        return {"guidance_scale": self.guidance, "width": self.width, "height": self.height}

    def noise(self, images: Sequence[int]) -> list[torch.Generator]:
        """Return the noise of some images, from generators on the CPU, which are the same on every device."""
        return [torch.Generator("cpu").manual_seed(self.seed + i) for i in images]


def image_file(folder: Path, index: int) -> Path:
    """Return where image ``index`` is kept."""
    return folder / f"{index:05d}.png"


def image_files(folder: Path, count: int) -> list[Path]:
    """Return where the first ``count`` images are kept."""
    return [image_file(folder, index) for index in range(count)]


def missing_groups(folder: Path, count: int, batch: int) -> list[range]:
    """Return the fixed groups, of ``count`` images drawn ``batch`` at once, of which an image is not there yet."""
    groups = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return [group for group in groups if not all(image_file(folder, i).exists() for i in group)]


def claim_folder(folder: Path, candidate: Candidate, drawing: Drawing, prompts: Sequence[Prompt], weights: int) -> None:
    """Write down in ``folder`` what is drawn there, or check that it is the same if images are there.

    ``weights`` is a checksum of the model. More prompts may be asked for later, as long as those before stay the same.
    Raises an `ImportError` if psutil is not installed, which tells files of killed processes from those being written,
    and a `ValueError` if images of something else are there, or of nobody knows what.
    """
    optional("psutil")
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    asked: dict[str, Any] = {"method": candidate.as_dict(), "drawing": asdict(drawing), "weights": weights}
    checksums = [zlib.crc32(prompt.text.encode()) for prompt in prompts]
    file = folder / SETTINGS
    if any(folder.glob("*.png")):
        if not file.exists():
            raise ValueError(f"{folder} holds images, but no {SETTINGS} says of what; give another --out, or remove it")
        try:
            stored = read_json(file)
            before = list(stored["prompts"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} does not say what is drawn in its folder; give another --out, or remove the folder"
            ) from error
        changed = [f"another {key}" for key in asked if stored.get(key) != asked[key]]
        if any(ours != theirs for ours, theirs in zip(checksums, before, strict=False)):
            changed.append("other prompts")
        if changed:
            raise ValueError(f"{folder} holds images of {changed[0]}; give another --out, or remove it")
        if len(before) >= len(checksums):
            return
    save_json({**asked, "prompts": checksums}, file)


def draw_group(
    pipe: Any, prompts: Sequence[Prompt], candidate: Candidate, drawing: Drawing, folder: Path, group: range
) -> None:
    """Draw a group of images, from `missing_groups`. Each is written whole or not at all."""
    with candidate.applied(pipe, seed=drawing.seed + group.start):
        images = pipe(
            [prompts[i].text for i in group],
            num_inference_steps=candidate.steps_of(drawing.steps),
            generator=drawing.noise(group),
            **drawing.call,
        ).images
    for index, image in zip(group, images, strict=True):
        save_image(image, image_file(folder, index))
