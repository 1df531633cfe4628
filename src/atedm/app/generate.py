"""Make images, dense and pruned, and write everything needed to make them again."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from atedm.app.equal_cost import image_size, plan_cost, request_cost
from atedm.app.pictures.comparison import Comparison, PrunedImage, comparison_sheet, psnr
from atedm.app.pictures.maps import maps_sheet
from atedm.app.request import ImageResult, Request
from atedm.app.run_file import OutputFolder, run_file
from atedm.hosts.models import check_protected
from atedm.method.contract import Method
from atedm.method.protection import region
from atedm.patch import pruned
from atedm.plans.plan import Plan
from atedm.record import Recording, recorded

Progress = Callable[[str, int, int], None]
"""Called with what is being made, such as "dense 0" or "pruned 3", the steps that are done, and all steps."""

Watch = Callable[[str, Image.Image, Recording | None], None]
"""Called with "dense", "pruned" or "other", the image, and what was kept while it was made."""


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
) -> list[ImageResult]:
    """Make one pruned image for each prompt, and write PNGs, sheets and ``run.json`` to a folder.

    Image i has seed ``request.seed + i``. Files appear whole or not at all. ``run.json`` is there from the first image
    on and lists those made so far, so a run that was stopped can be made again from it.

    Args:
        pipe: A text-to-image pipeline with a model that can be pruned, not patched.
        request: What to make.
        out: The folder. Images of an earlier run in it are removed as soon as there is one of this run.
        compare: Make each image dense too, and by ``request.other``, and draw all of them in ``comparison.png``.
        maps: Draw ``maps-N.png``: importance and kept tokens over each image, per block and step.
        model: Name of the model, for ``run.json``.
        progress: Told of every step. What it raises ends the run.
        watch: Given every image as soon as it is made.

    Raises:
        TypeError: If the pipeline has no such model.
        FileNotFoundError: If the mask of ``request.protect`` does not exist.
        ValueError: If there is nothing to prune, or the mask is no picture or protects more than is kept.
    """
    mask = None if request.protect is None else _read_mask(Path(request.protect))
    methods: dict[str, Method | Plan | None] = {"dense": None} if compare else {}
    methods["pruned"] = request.plan or request.method
    if compare and request.other is not None:
        methods["other"] = request.other
    names, costs = {}, {}
    width, height = (side // pipe.vae_scale_factor for side in image_size(pipe, request))
    for kind, method in methods.items():
        if method is not None:
            with pruned(pipe, method, protect=mask):  # before any work: refuses what cannot be pruned
                if mask is not None and _drops_tokens(method):
                    check_protected(pipe, (height, width))
            if isinstance(method, Plan):
                names[kind], costs[kind] = f"plan, {request.steps} steps", plan_cost(pipe, request, method)
            else:
                names[kind], costs[kind] = method.name, request_cost(pipe, request, method)

    results: list[ImageResult] = []
    comparisons: list[Comparison] = []
    folder = OutputFolder(out, lambda: run_file(pipe, request, model, costs["pruned"], results), mask)
    for index, prompt in enumerate(request.prompts):
        made: dict[str, _Made] = {}
        for kind, method in methods.items():
            one = made[kind] = _make(pipe, request, index, kind, method, mask, progress)
            folder.save(one.image, f"{kind}-{index}.png")
            if watch is not None:
                watch(kind, one.image, one.recording)
        image, recording = made["pruned"].image, made["pruned"].recording
        if maps and recording is not None and recording.observations:
            folder.save(maps_sheet(image, recording, prompt), f"maps-{index}.png")
        if compare:
            shown = [
                PrunedImage(f"{name}, cost {costs[kind]:.2f}", made[kind].image, made[kind].recording)
                for kind, name in names.items()
            ]
            comparisons.append(Comparison(prompt, made["dense"].image, tuple(shown)))
        results.append(_result(request, index, made))
        folder.save_run_file()
    if comparisons:
        headline = f"Same noise, {request.dense_steps} steps; cost is the share of the dense arithmetic"
        folder.save(comparison_sheet(comparisons, headline), "comparison.png")
    return results


class _Made(NamedTuple):
    image: Image.Image
    seconds: float
    recording: Recording | None


def _make(
    pipe: Any,
    request: Request,
    index: int,
    kind: str,
    method: Method | Plan | None,
    mask: Image.Image | None,
    progress: Progress | None,
) -> _Made:
    """Make one image, dense if there is no method."""
    steps = request.steps if kind == "pruned" else request.dense_steps

    def on_step(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(f"{kind} {index}", step + 1, steps)
        return kwargs

    recording = None
    with ExitStack() as stack:
        if method is not None:
            stack.enter_context(pruned(pipe, method, protect=mask))
            if _drops_tokens(method):
                recording = stack.enter_context(recorded(pipe))
        started = time.perf_counter()
        images = pipe(
            request.prompts[index],
            num_inference_steps=steps,
            guidance_scale=request.guidance,
            width=request.width,
            height=request.height,
            # A generator on the CPU gives the same noise on every device.
            generator=torch.Generator("cpu").manual_seed(request.seed + index),
            callback_on_step_end=on_step,
        ).images
        return _Made(images[0], time.perf_counter() - started, recording)


def _drops_tokens(method: Method | Plan) -> bool:
    return not isinstance(method, Plan) or method.method is not None


def _result(request: Request, index: int, made: Mapping[str, _Made], kind: str = "pruned") -> ImageResult:
    one, dense = made[kind], made.get("dense")
    return ImageResult(
        file=f"{kind}-{index}.png",
        prompt=request.prompts[index],
        seed=request.seed + index,
        seconds=round(one.seconds, 3),
        kept_share=1.0 if one.recording is None else round(one.recording.kept_share, 4),
        dense_file=None if dense is None else f"dense-{index}.png",
        dense_seconds=None if dense is None else round(dense.seconds, 3),
        psnr_to_dense=None if dense is None else min(round(psnr(one.image, dense.image), 2), 999.0),
        other=_result(request, index, made, "other") if kind == "pruned" and "other" in made else None,
    )


def _read_mask(file: Path) -> Image.Image:
    """Read a mask, black and white; raise a `ValueError` if it is no picture."""
    try:
        with Image.open(file) as picture:
            return Image.fromarray(region(picture).mul(255).byte().numpy())
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no picture ({error}); give a PNG, white where nothing is to be dropped") from error
