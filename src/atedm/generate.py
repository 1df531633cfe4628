"""Make images, dense and pruned, and write down everything needed to make them again."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from atedm.config import PRESETS, PruningConfig, preset
from atedm.costs.budget import CostOutOfReach
from atedm.costs.fit import mean_share
from atedm.files import save_image, save_json
from atedm.patching.apply import check_protected, pruned
from atedm.pictures.comparison import Comparison, Pruned, comparison_sheet, psnr
from atedm.pictures.maps import maps_sheet
from atedm.pipelines import native_size
from atedm.protection import region
from atedm.recording import Recording, recorded
from atedm.request import Made, Request
from atedm.run_file import NAME, PROTECT, run_file

Progress = Callable[[str, int, int], None]
"""Called with what is being made, the step that is done, and the number of steps."""

Watch = Callable[[str, Image.Image, Recording | None], None]
"""Called with "dense", "pruned" or "beside", the image, and what was kept while it was made."""


def generate(
    pipe: Any,
    request: Request,
    out: Path,
    *,
    compare: bool = False,
    maps: bool = False,
    model: str = "",
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Made]:
    """Make one pruned image a prompt and write PNGs, sheets and ``run.json`` to a folder.

    Image i has seed ``request.seed + i``. Files appear whole or not at all. ``run.json`` is there from the first image
    on, and lists those made so far: a run that broke off can be drawn again from it.

    Args:
        pipe: A text-to-image pipeline with a U-Net, not patched.
        request: What to make.
        out: The folder; made if missing. Images of an earlier run in it make room as soon as there is one of this.
        compare: Make each image dense too, and by ``request.beside``, and ``comparison.png``: the dense one, then of
            each way to prune the image, its difference to dense, and the kept tokens.
        maps: Draw ``maps-N.png``: importance and kept tokens over each image, per block and step.
        model: Name of the model, for ``run.json``.
        progress: Told of every step. What it raises ends the run.
        watch: Given every image as soon as it is made.

    Raises:
        TypeError: If the pipeline has no U-Net.
        FileNotFoundError: If the mask of ``request.protect`` is not there.
        ValueError: If there is nothing to prune in it, or the mask is no picture or protects more than is kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    mask = None if request.protect is None else _picture(Path(request.protect))
    ways = {"pruned": request.config}
    if compare and request.beside is not None:
        ways["beside"] = request.beside
    summaries = {}
    for way, config in ways.items():
        with pruned(pipe, config, protect=mask) as summaries[way]:  # before any work: refuses what cannot be pruned
            check_protected(pipe, _latent_size(pipe, request))
    summary = summaries["pruned"]
    names = {way: _name_with_cost(pipe, request, config) for way, config in ways.items()} if compare else {}
    made: list[Made] = []
    begun = False

    def save(image: Image.Image, name: str) -> None:
        nonlocal begun
        if not begun:  # not before there is something to put in the place of an earlier run
            _clear(out)
            save_json(run_file(pipe, request, model, summary, made), out / NAME)
            if mask is not None:
                save_image(mask, out / PROTECT)
            begun = True
        save_image(image, out / name)

    comparisons: list[Comparison] = []
    for index, prompt in enumerate(request.prompts):
        dense, dense_seconds = None, None
        if compare:
            dense, dense_seconds = _make(pipe, request, index, f"dense {index}", progress)
            save(dense, f"dense-{index}.png")
            if watch is not None:
                watch("dense", dense, None)
        drawn: dict[str, Made] = {}
        shown: list[Pruned] = []
        for way, config in ways.items():
            with pruned(pipe, config, protect=mask), recorded(pipe) as recording:
                image, seconds = _make(pipe, request, index, f"{way} {index}", progress)
            save(image, f"{way}-{index}.png")
            if watch is not None:
                watch(way, image, recording)
            if dense is not None:
                shown.append(Pruned(names[way], image, recording))
            if maps and way == "pruned" and recording.observations:
                save(maps_sheet(image, recording, prompt), f"maps-{index}.png")
            drawn[way] = Made(
                file=f"{way}-{index}.png",
                prompt=prompt,
                seed=request.seed + index,
                seconds=round(seconds, 3),
                kept_share=round(recording.kept_share, 4),
                dense_file=f"dense-{index}.png" if compare else None,
                dense_seconds=None if dense_seconds is None else round(dense_seconds, 3),
                psnr_to_dense=None if dense is None else min(round(psnr(image, dense), 2), 999.0),
            )
        if dense is not None:
            comparisons.append(Comparison(prompt, dense, tuple(shown)))
        made.append(dataclasses.replace(drawn["pruned"], beside=drawn.get("beside")))
        save_json(run_file(pipe, request, model, summary, made), out / NAME)
    if comparisons:
        headline = f"Same noise, {request.steps} steps; cost is the share of the dense arithmetic"
        save(comparison_sheet(comparisons, headline), "comparison.png")
    return made


_OURS = re.compile(r"(pruned|dense|beside|maps)-\d+\.png|comparison\.png")
"""Names that a run gives its pictures, and nobody else is likely to."""


def _clear(out: Path) -> None:
    """Remove what an earlier run left in a folder, or its images would lie beside a ``run.json`` they are not of."""
    if not (out / NAME).exists():
        return
    for file in out.iterdir():
        if file.name == PROTECT or _OURS.fullmatch(file.name):
            file.unlink()


def within_budget(pipe: Any, request: Request, share: float) -> Request:
    """Return ``request`` with the least pruning rate at which its run costs this share of the dense one.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If the budget cannot be kept; the message names the floor.
    """
    config = PruningConfig.for_budget(
        pipe, share=share, config=request.config, size=_size(pipe, request), steps=request.steps
    )
    return dataclasses.replace(request, config=config)


def shown_beside(pipe: Any, request: Request, name: str = "") -> Request:
    """Return ``request`` with another way to prune beside it, at the same cost where it comes down to that.

    Args:
        pipe: A pipeline with a U-Net.
        request: What to make.
        name: A preset; by default "matched" beside AT-EDM, and "paper" beside matched pruning.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If the preset is unknown, or there is nothing to prune.
    """
    name = name or ("matched" if request.config.method_name == PRESETS["paper"].method_name else "paper")
    other = preset(name)
    size = _size(pipe, request)
    share = mean_share(pipe, request.config, size=size, steps=request.steps)
    with suppress(CostOutOfReach):
        other = PruningConfig.for_budget(pipe, share=share, config=other, size=size, steps=request.steps)
    return dataclasses.replace(request, beside=other)


def _picture(file: Path) -> Image.Image:
    """Read a mask, black and white.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no picture.
    """
    try:
        with Image.open(file) as picture:
            return Image.fromarray(region(picture).mul(255).byte().numpy())
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no picture ({error}); give a PNG, white where nothing is to be dropped") from error


def _size(pipe: Any, request: Request) -> tuple[int, int]:
    width, height = native_size(pipe)
    return (request.width or width, request.height or height)


def _latent_size(pipe: Any, request: Request) -> tuple[int, int]:
    width, height = _size(pipe, request)
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def _name_with_cost(pipe: Any, request: Request, config: PruningConfig) -> str:
    share = mean_share(pipe, config, size=_size(pipe, request), steps=request.steps)
    return f"{config.method_name}, cost {share:.2f}"


def _make(pipe: Any, request: Request, index: int, what: str, progress: Progress | None) -> tuple[Image.Image, float]:
    def on_step(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(what, step + 1, request.steps)
        return kwargs

    started = time.perf_counter()
    images = pipe(
        request.prompts[index],
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        width=request.width,
        height=request.height,
        # A generator on the CPU gives the same noise on every device.
        generator=torch.Generator("cpu").manual_seed(request.seed + index),
        callback_on_step_end=on_step,
    ).images
    return images[0], time.perf_counter() - started
