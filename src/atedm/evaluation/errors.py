"""Where pruning errs, and how the errors of a run add up: measured along dense runs, so that none feeds on another.

At every step the pruned twin of the U-Net is handed what the dense one was handed. A block's error is what it adds in
place of what the dense block adds to the same features. A step's error is what the guided prediction is off by; under
an Euler scheduler it moves the image in proportion, so the moves of all steps have a sum. If errors had nothing to do
with each other, the sum would grow as the root of their squares does; if they were alike, as they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from atedm.config import PruningConfig
from atedm.generate import Progress
from atedm.patching.apply import apply, before_forward, is_applied
from atedm.patching.survey import find_blocks, find_unet
from atedm.patching.twins import twin_of

_PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class MethodErrors:
    """Errors of one way to prune, averaged over images as a root of mean squares."""

    name: str
    #: By block, each step's error of what the block adds, relative to it.
    blocks: Mapping[str, tuple[float, ...]]
    #: Each step's error of the guided prediction, relative to it.
    steps: tuple[float, ...]
    #: After each step, how far the image has been moved by all errors so far, relative to the final image.
    moved: tuple[float, ...]
    #: The same if errors of different steps had nothing to do with each other.
    moved_if_independent: tuple[float, ...]
    #: Mean cosine between the errors of one step and the next.
    successive: float


@dataclass(frozen=True)
class ErrorsReport:
    """All methods over the same images."""

    methods: tuple[MethodErrors, ...]
    #: Feature level by block.
    levels: Mapping[str, int]
    images: int
    steps: int

    def of_level(self, method: MethodErrors, level: int) -> float:
        """Root of the mean square over the blocks of a level and all steps; nan if none is there."""
        values = [v for name, steps in method.blocks.items() if self.levels[name] == level for v in steps]
        return (sum(v * v for v in values) / len(values)) ** 0.5 if values else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


@dataclass
class _Sums:
    """Squares summed over images, for one method."""

    blocks: dict[str, list[float]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    successive: list[float] = field(default_factory=list)
    images: int = 0


def find_errors(
    pipe: Any,
    prompts: Sequence[str],
    configs: Mapping[str, PruningConfig],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    batch: int = 10,
    progress: Progress | None = None,
) -> ErrorsReport:
    """Draw prompts dense, and prune beside.

    Image i has the noise of seed ``seed + i``.

    Args:
        pipe: A text-to-image pipeline with an `EulerDiscreteScheduler`, not patched and not compiled.
        prompts: One image each.
        configs: What to prune, by name.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Of the first image.
        batch: Images drawn at once.
        progress: Told of every step.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled, there is nothing to draw or prune, or steps do not sum up to a move.
    """
    if not prompts or not configs:
        raise ValueError("there must be at least one prompt and one way to prune")
    unet = find_unet(pipe)
    if is_applied(unet) or unet is not pipe.unet:
        raise ValueError("this U-Net is patched or compiled, and errors are looked for beside dense runs; undo that")
    prediction = pipe.scheduler.config.get("prediction_type")
    if not isinstance(pipe.scheduler, EulerDiscreteScheduler) or prediction not in _PREDICTIONS:
        raise ValueError(
            f"errors of steps sum up under an EulerDiscreteScheduler that predicts {' or '.join(_PREDICTIONS)}, not "
            f"under a {type(pipe.scheduler).__name__} that predicts {prediction}"
        )
    twins = {name: _Twins(unet, config) for name, config in configs.items()}
    for start in range(0, len(prompts), batch):
        group = list(prompts[start : start + batch])

        def end_step(_: Any, step: int, __: Any, kwargs: dict[str, Any], start: int = start) -> dict[str, Any]:
            if progress is not None:
                progress(f"images from {start}", step + 1, steps)
            return kwargs

        with _beside(pipe, twins, len(group), guidance):
            latents = pipe(
                group,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(group))],
                output_type="latent",
                callback_on_step_end=end_step,
            ).images
        for each in twins.values():
            each.end_images(latents)
    levels = {name: place.level for name, (place, _) in find_blocks(unet).items()}
    return ErrorsReport(tuple(each.errors(name) for name, each in twins.items()), levels, len(prompts), steps)


class _Twins:
    """Two pruned U-Nets that share the weights of a dense one: one runs whole, of the other single blocks."""

    def __init__(self, unet: UNet2DConditionModel, config: PruningConfig) -> None:
        self.whole, self.parts = (twin_of(unet) for _ in range(2))
        for twin in (self.whole, self.parts):
            apply(twin, config)
        self.sums = _Sums()
        self._errors: list[Tensor] = []
        self._moves: list[Tensor] = []
        self._relative: list[Tensor] = []
        self._of_blocks: dict[str, list[Tensor]] = {}

    def see_block(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Run one block on what the dense one was given."""
        start = args[0] if args else kwargs["hidden_states"]
        pruned = self.parts.get_submodule(name)(*args, **kwargs)
        pruned = pruned[0] if isinstance(pruned, tuple) else pruned.sample
        self._of_blocks.setdefault(name, []).append(_norm(pruned - output) / _norm(output - start))

    def see_step(self, args: Any, kwargs: Any, dense: Tensor, guidance: float, move: float) -> None:
        """Run all of it on what the dense one was given."""
        pruned = self.whole(*args, **kwargs)
        pruned = pruned[0] if isinstance(pruned, tuple) else pruned.sample
        expected = _guided(dense, guidance)
        error = _guided(pruned, guidance) - expected
        self._errors.append(error)
        self._moves.append(move * error)
        self._relative.append(_norm(error) / _norm(expected))

    def end_images(self, latents: Tensor) -> None:
        """Add up what was seen of one batch of images, of which ``latents`` came."""
        sums, size = self.sums, _norm(latents)
        images = len(latents)
        per_image = [_cosine(a, b) for a, b in zip(self._errors, self._errors[1:], strict=False)]
        sums.successive += [float(x) for each in per_image for x in each]
        moves = torch.stack(self._moves)
        moved = moves.cumsum(0).flatten(2).norm(dim=-1) / size
        apart = moves.flatten(2).norm(dim=-1).square().cumsum(0).sqrt() / size
        for into, values in ((sums.moved, moved), (sums.apart, apart), (sums.steps, torch.stack(self._relative))):
            _add(into, values.square().sum(-1).tolist())
        for name, values_of in self._of_blocks.items():
            # Both halves of guidance count alike.
            squares = torch.unflatten(torch.stack(values_of).square(), -1, (-1, images)).mean(1).sum(-1)
            _add(sums.blocks.setdefault(name, []), squares.tolist())
        sums.images += images
        self._errors, self._moves, self._relative, self._of_blocks = [], [], [], {}

    def errors(self, name: str) -> MethodErrors:
        """Give the roots of the mean squares."""

        def root(values: list[float]) -> tuple[float, ...]:
            return tuple((value / self.sums.images) ** 0.5 for value in values)

        sums = self.sums
        return MethodErrors(
            name,
            {block: root(values) for block, values in sums.blocks.items()},
            root(sums.steps),
            root(sums.moved),
            root(sums.apart),
            sum(sums.successive) / max(1, len(sums.successive)),
        )


@contextmanager
def _beside(pipe: Any, twins: Mapping[str, _Twins], images: int, guidance: float) -> Iterator[None]:
    """Let the twins run beside every call of the dense U-Net."""
    unet = pipe.unet
    calls = 0

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        for each in twins.values():
            before_forward(each.parts, args, kwargs)

    @torch.no_grad()
    def end_block(name: str, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output.sample
        for each in twins.values():
            if name in each.parts._atedm.blocks:
                each.see_block(name, args, kwargs, result)

    @torch.no_grad()
    def end(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal calls
        result = output[0] if isinstance(output, tuple) else output.sample
        sigma, following = (float(x) for x in pipe.scheduler.sigmas[calls : calls + 2])
        # Of a velocity, noise has a share of 1 / sqrt(sigma^2 + 1).
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        move = (following - sigma) / ((sigma * sigma + 1) ** 0.5 if velocity else 1.0)
        calls += 1
        for each in twins.values():
            each.see_step(args, kwargs, result, guidance if len(result) > images else 0.0, move)

    with ExitStack() as hooks:
        hooks.callback(unet.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name, (_, block) in find_blocks(unet).items():
            hooks.callback(block.register_forward_hook(partial(end_block, name), with_kwargs=True).remove)
        hooks.callback(unet.register_forward_hook(end, with_kwargs=True).remove)
        yield


def _guided(prediction: Tensor, guidance: float) -> Tensor:
    if not guidance:
        return prediction.float()
    without, with_prompt = prediction.float().chunk(2)
    return without + guidance * (with_prompt - without)


def _norm(tensor: Tensor) -> Tensor:
    """Norm of each element of the batch."""
    norm: Tensor = tensor.float().flatten(1).norm(dim=-1)
    return norm


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(-1) / (_norm(a) * _norm(b)).clamp_min(1e-12)


def _add(into: list[float], values: list[float]) -> None:
    into[:] = [a + b for a, b in zip(into, values, strict=True)] if into else values
