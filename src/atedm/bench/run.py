"""Time methods in turns in one run: steps of the U-Net, or whole images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atedm.bench.report import BenchReport, Timed
from atedm.bench.turns import counted_share, images_in_turns, steps_in_turns
from atedm.costs.architectures import architecture
from atedm.costs.fit import mean_share
from atedm.costs.latency import Spread
from atedm.costs.machine import processor_of, versions_of
from atedm.costs.random_weights import random_unet
from atedm.evaluation.methods import Dense, Merging, Method, Pruning
from atedm.generate import Progress
from atedm.pipelines import TINY, best_device, habits, load_pipeline, usual_dtype

_PACKAGES = ("torch", "diffusers", "tomesd", "DeepCache")
_MANY = 10**6
"""Steps, of which even a small share shows."""


def bench(
    model: str,
    methods: Mapping[str, Method],
    *,
    whole_images: bool | None = None,
    steps: int = 20,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    repeats: int = 5,
    memory: bool = True,
    progress: Progress | None = None,
) -> BenchReport:
    """Time each method, in turns, after one round to warm up.

    Dense runs diffusers' own attention, which is torch's fused one, and comes first whether it is named or not. A step
    is a normal one, in which no schedule spares anything; of what works in cycles it is the mean over a cycle.

    Args:
        model: As `atedm.cost`, with random weights, because the time of a step does not ask what they say; or, for
            whole images, as `atedm.pipelines.load_pipeline`, with its own.
        methods: By name.
        whole_images: Time images from words to pixels in place of steps; by default where the weights are at hand.
        steps: Denoising steps of an image.
        size: (width, height) in pixels; by default what the model was trained for.
        batch: Images at a time.
        guidance: Whether the U-Net runs on two of each; by default as the model is run.
        dtype: By default float32 on the CPU and float16 elsewhere.
        device: By default the fastest there is.
        repeats: Rounds that count.
        memory: Whether to measure the peak of activations too, in one round more.
        progress: Told of every method in every round.

    Raises:
        FileNotFoundError: If ``model`` is a folder that is not there.
        ValueError: If an argument is out of its range, or a step does not show what a method does.
    """
    for name, count in (("batch", batch), ("repeats", repeats), ("steps", steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    whole_images = has_weights(model) if whole_images is None else whole_images
    for name, method in methods.items():
        if method.steps_of(_MANY) != _MANY and not whole_images:
            raise ValueError(f"{name} takes fewer steps, which a single step does not show; time whole images")
    methods = {"dense": Dense(), **{name: method for name, method in methods.items() if method != Dense()}}
    device = device or best_device()
    dtype = dtype or usual_dtype(device)
    pipe = load_pipeline(model, device=device, dtype=dtype) if whole_images else None
    counted = model if pipe is None or model == TINY else pipe
    arch = architecture(counted)
    size = size or arch.default_size
    guidance = habits(model).guidance > 0 if guidance is None else guidance
    shares = {
        name: share_of_image(counted, method, size, steps) if whole_images else share_of_step(counted, method, size)
        for name, method in methods.items()
    }
    if pipe is None:
        unet = random_unet(arch, dtype, device)
        call = arch.call(size, batch * (2 if guidance else 1), device=device, dtype=dtype)
        turns = steps_in_turns(unet, call, methods, repeats, progress, memory=memory)
    else:
        prompts = habits(model).prompts
        call = {
            "prompt": [prompts[i % len(prompts)] for i in range(batch)],
            "guidance_scale": (habits(model).guidance or 7.0) if guidance else 0.0,
            "width": size[0],
            "height": size[1],
        }
        turns = images_in_turns(pipe, call, methods, steps, repeats, progress, memory=memory)
    return BenchReport(
        model=model,
        timed="step" if pipe is None else "image",
        weights="random" if pipe is None else "its own",
        size=size,
        batch=batch,
        guidance=guidance,
        steps=None if pipe is None else steps,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        processor=processor_of(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
        versions=versions_of(*_PACKAGES),
        rows={
            name: Timed(
                methods[name].as_dict(),
                shares[name],
                Spread.of(took.times),
                Spread.of([ours / dense for ours, dense in zip(took.times, turns["dense"].times, strict=True)]),
                took.peak,
            )
            for name, took in turns.items()
        },
    )


def has_weights(model: str) -> bool:
    """Whether a model's weights are at hand: the one that ships, a file, or a folder that holds those of its U-Net."""
    folder = Path(model).expanduser()
    return model == TINY or folder.is_file() or any((folder / "unet").glob("*.safetensors"))


def share_of_step(model: Any, method: Method, size: tuple[int, int]) -> float:
    """Share of the dense multiply-accumulates that a normal step takes, everything that is added counted.

    Of what lasts for several steps it is the mean of them.

    Args:
        model: As `atedm.cost`.
        method: What is applied.
        size: (width, height) in pixels.
    """
    if isinstance(method, Pruning) and not method.config.own_functions:
        return mean_share(model, method.config.replace(schedule="constant"), size=size)
    if isinstance(method, Merging):
        return mean_share(model, replace(method.tome, prune_less_share=0.0), size=size)
    arch = architecture(model)
    return 1.0 if method == Dense() else counted_share(arch.on_meta(), arch.call(size), method)


def share_of_image(model: Any, method: Method, size: tuple[int, int], steps: int) -> float:
    """Share of the dense multiply-accumulates of the U-Net that a run of ``steps`` steps takes, as `share_of_step`."""
    if isinstance(method, Pruning) and not method.config.own_functions:
        return mean_share(model, method.config, size=size, steps=steps)
    if isinstance(method, Merging):
        return mean_share(model, method.tome, size=size, steps=steps)
    if isinstance(method, Dense):
        return method.steps_of(steps) / steps
    arch = architecture(model)
    return counted_share(arch.on_meta(), arch.call(size), method, steps)
