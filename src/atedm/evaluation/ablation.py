"""The ablation table: every variant draws the same held-out captions from the same noise and is judged."""

from __future__ import annotations

import functools
import multiprocessing
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atedm.choices import check_name
from atedm.config import PruningConfig
from atedm.evaluation.captions import columns, judge_images, make_scenes, psnr_each
from atedm.evaluation.statistics import Interval, mean_interval, ratio_interval
from atedm.evaluation.variants import DENSE, variants
from atedm.files import read_json, save_json, written_whole
from atedm.patching.apply import pruned
from atedm.pipelines import TINY, load_pipeline, quiet_libraries, tiny_folder
from atedm.tiny.classifier import ATTRIBUTES, load_classifier
from atedm.tiny.scenes import held_out_scenes

UNET_WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Settings:
    """What is the same for every row. ``weights`` is a checksum: rows of another model are not read back."""

    captions: int = 200
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    batch: int = 10
    weights: int = 0

    def __post_init__(self) -> None:
        """Check every value, and note which weights are there to be measured."""
        object.__setattr__(self, "weights", zlib.crc32((tiny_folder() / UNET_WEIGHTS).read_bytes()))
        for name in ("captions", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One variant's figures. Costs are shares of the dense attention blocks, by arithmetic."""

    name: str
    settings: Settings
    config: dict[str, Any] | None
    #: Share of the attention blocks' multiply-accumulates a run takes, what pruning adds included.
    cost: float
    #: Per attribute, and "all" of a caption at once: (mean, low, high).
    accuracy: dict[str, Interval]
    #: Distance to the dense image in dB, None for dense itself.
    psnr: Interval | None


def measure_row(name: str, settings: Settings, folder: Path) -> Row:
    """Make and judge one variant's images; keep the row, and dense's images, in ``folder``."""
    # By the settings, so that a run under others does not take its place.
    under = f"{zlib.crc32(repr(settings).encode()):08x}"
    file = folder / f"{name.replace(' ', '-').replace(',', '')}-{under}.json"
    dense_file = folder / f"dense-{under}.npy"
    pipe = load_pipeline(TINY, device="cpu")
    config = _variants(pipe, settings)[name]
    stored = _read(file, settings, config)
    if stored is not None and dense_file.exists():
        return stored
    scenes = held_out_scenes(settings.captions, settings.seed)
    draw = functools.partial(
        make_scenes,
        pipe,
        scenes,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        batch=settings.batch,
    )
    if config is None:
        images, cost = draw(), 1.0
        with written_whole(dense_file) as partial, partial.open("wb") as stream:
            np.save(stream, images.numpy())
        psnr = None
    else:
        with pruned(pipe, config) as summary:
            images = draw()
        cost = 1 - summary.run_saving(settings.steps)
        psnr = mean_interval(psnr_each(images, torch.from_numpy(np.load(dense_file))))
    judgements = judge_images(load_classifier(tiny_folder() / "classifier.safetensors"), scenes, images)
    accuracy = {key: ratio_interval(*pair) for key, pair in columns(judgements).items()}
    row = Row(name, settings, None if config is None else config.as_dict(), cost, accuracy, psnr)
    save_json(asdict(row), file)
    return row


def measure(
    folder: Path,
    settings: Settings,
    *,
    only: Sequence[str] = (),
    workers: int = 1,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure every row of the table; rows already in ``folder`` under the same settings are read back.

    Args:
        folder: Where rows are kept, one JSON file each.
        settings: What is the same for every row.
        only: Names of rows; all of them by default. Dense is always measured, because distances are to it.
        workers: Processes, of one thread each where there are several.
        report: Called with each row as it is done.

    Raises:
        ValueError: If a name is unknown.
    """
    names = list(_variants(load_pipeline(TINY, device="cpu"), settings))
    for name in only:
        check_name("row", name, names)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in names if not only or name in only or name == DENSE]
    rows = {DENSE: measure_row(DENSE, settings, folder)}
    if report is not None:
        report(rows[DENSE])
    context = multiprocessing.get_context("spawn")
    if workers == 1:
        for name in names[1:]:
            rows[name] = measure_row(name, settings, folder)
            if report is not None:
                report(rows[name])
    else:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            jobs = {pool.submit(measure_row, name, settings, folder): name for name in names[1:]}
            for job in as_completed(jobs):
                rows[jobs[job]] = job.result()
                if report is not None:
                    report(rows[jobs[job]])
    return [rows[name] for name in names]


def _start_worker() -> None:
    torch.set_num_threads(1)
    quiet_libraries()


def _variants(pipe: Any, settings: Settings) -> dict[str, PruningConfig | None]:
    with pruned(pipe, "paper") as paper:
        return variants(paper, settings.steps)


def _read(file: Path, settings: Settings, config: PruningConfig | None) -> Row | None:
    if not file.exists():
        return None
    stored = read_json(file)
    try:
        if stored["settings"] != asdict(settings) or stored["config"] != (config and config.as_dict()):
            return None
        return Row(
            stored["name"],
            settings,
            stored["config"],
            stored["cost"],
            {key: Interval(*value) for key, value in stored["accuracy"].items()},
            None if stored["psnr"] is None else Interval(*stored["psnr"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no row of this table; remove it, and the next run makes it again") from error


def markdown(rows: Sequence[Row]) -> str:
    """Show the rows as a Markdown table, with 95 % intervals."""
    head = ["variant", "cost", "PSNR to dense, dB", *(f"{name}, %" for name in ("all", *ATTRIBUTES))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        psnr = "" if row.psnr is None else row.psnr.text()
        shares = [row.accuracy[name].text(100) for name in ("all", *ATTRIBUTES)]
        lines.append("| " + " | ".join([row.name, f"{row.cost:.3f}", psnr, *shares]) + " |")
    return "\n".join(lines)
