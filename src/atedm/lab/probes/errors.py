"""Where pruning errs, and how the errors of a run add up: measured along dense runs, so that no error causes another.

At every step a pruned copy of the U-Net is given what the dense one was given. A block's error is what it adds in place
of what the dense block adds to the same features. A step's error is that of the guided prediction; under an Euler
scheduler it moves the image in proportion, so the moves of all steps have a sum. If errors were independent, the sum
would grow as the root of their squares does; if they were equal, as they do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from atedm.hosts.diffusers_unet import after_forward, before_forward
from atedm.hosts.unet_spans import find_spans
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import dense_unet, draw_dense
from atedm.lab.progress import Progress, silent
from atedm.lab.shared_weights import copy_with_shared_weights
from atedm.method.contract import Method
from atedm.patch import apply

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
    #: The same if errors of different steps were independent.
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
        return root_mean_square(values) if values else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def root_mean_square(values: Sequence[float]) -> float:
    """Root of the mean of squares; 0 of no values."""
    return (sum(value * value for value in values) / len(values)) ** 0.5 if values else 0.0


def find_errors(
    pipe: Any, prompts: Sequence[str], methods: Mapping[str, Method], drawing: Drawing, *, progress: Progress = silent
) -> ErrorsReport:
    """Draw prompts dense, and prune beside.

    ``pipe`` has an `EulerDiscreteScheduler`, and is neither patched nor compiled.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled, there is nothing to draw or prune, or steps do not sum up to a move.
    """
    unet, spans = dense_unet(pipe)
    prediction = pipe.scheduler.config.get("prediction_type")
    if not isinstance(pipe.scheduler, EulerDiscreteScheduler) or prediction not in _PREDICTIONS:
        raise ValueError(
            f"errors of steps sum up under an EulerDiscreteScheduler that predicts {' or '.join(_PREDICTIONS)}, not "
            f"under a {type(pipe.scheduler).__name__} that predicts {prediction}"
        )
    runs = {name: _PrunedBeside(unet, method) for name, method in methods.items()}
    if not runs:
        raise ValueError("there must be at least one way to prune")

    def watch(images: int) -> AbstractContextManager[None]:
        return _beside(pipe, [*runs.values()], images, drawing.guidance)

    for _, latents in draw_dense(pipe, prompts, drawing, watch, progress=progress):
        for each in runs.values():
            each.end_images(latents)
    levels = {name: place.level for name, (place, _) in spans.items()}
    found = tuple(each.errors(name) for name, each in runs.items())
    return ErrorsReport(found, levels, len(prompts), drawing.steps)


class _PrunedBeside:
    """Two pruned U-Nets that share the weights of a dense one: one runs whole, of the other single blocks."""

    def __init__(self, unet: UNet2DConditionModel, method: Method) -> None:
        self.whole, self.parts = (copy_with_shared_weights(unet) for _ in range(2))
        for copied in (self.whole, self.parts):
            apply(copied, method)
        #: Squares summed over images, by block and by figure, one a step.
        self.blocks: defaultdict[str, float | Tensor] = defaultdict(float)
        self.figures: defaultdict[str, float | Tensor] = defaultdict(float)
        self.images = 0
        self._errors: list[tuple[Tensor, float, Tensor]] = []
        self._of_blocks: defaultdict[str, list[Tensor]] = defaultdict(list)

    def see_block(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Run one block on what the dense one was given."""
        if name in self.parts._atedm.spans:
            start = args[0] if args else kwargs["hidden_states"]
            pruned = _first(self.parts.get_submodule(name)(*args, **kwargs))
            self._of_blocks[name].append(_norm(pruned - output) / _norm(output - start))

    def see_step(self, args: Any, kwargs: Any, dense: Tensor, guidance: float, move: float) -> None:
        """Run all of it on what the dense one was given."""
        expected = _guided(dense, guidance)
        error = _guided(_first(self.whole(*args, **kwargs)), guidance) - expected
        self._errors.append((error, move, _norm(error) / _norm(expected)))

    def end_images(self, latents: Tensor) -> None:
        """Add up what was seen of one batch of images, of which ``latents`` came."""
        size = _norm(latents)
        errors = torch.stack([error.flatten(1) for error, _, _ in self._errors])
        moves = errors * torch.tensor([move for _, move, _ in self._errors], device=errors.device)[:, None, None]
        cosines = functional.cosine_similarity(errors[:-1], errors[1:], dim=-1, eps=1e-12)
        squares = {
            "moved": (moves.cumsum(0).norm(dim=-1) / size).square(),
            "independent": moves.square().sum(-1).cumsum(0) / size.square(),
            "steps": torch.stack([relative for _, _, relative in self._errors]).square(),
            "successive": cosines,
        }
        for name, values in squares.items():
            self.figures[name] = self.figures[name] + values.sum(-1).cpu()
        for name, of_block in self._of_blocks.items():
            # Both halves of guidance count alike.
            halves = torch.unflatten(torch.stack(of_block).square(), -1, (-1, len(latents))).mean(1)
            self.blocks[name] = self.blocks[name] + halves.sum(-1).cpu()
        self.images += len(latents)
        self._errors.clear()
        self._of_blocks.clear()

    def errors(self, name: str) -> MethodErrors:
        """Give the roots of the mean squares."""

        def root(values: float | Tensor) -> tuple[float, ...]:
            return tuple((torch.as_tensor(values) / self.images).sqrt().tolist())

        blocks = {block: root(values) for block, values in self.blocks.items()}
        steps, moved, independent = (root(self.figures[figure]) for figure in ("steps", "moved", "independent"))
        cosines = torch.as_tensor(self.figures["successive"]) / self.images
        return MethodErrors(name, blocks, steps, moved, independent, float(cosines.mean()) if cosines.numel() else 0.0)


@contextmanager
def _beside(pipe: Any, runs: Sequence[_PrunedBeside], images: int, guidance: float) -> Iterator[None]:
    """Let the pruned U-Nets run beside every call of the dense one."""
    unet = pipe.unet
    calls = 0

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        for each in runs:
            before_forward(each.parts, args, kwargs)

    @torch.no_grad()
    def end_block(name: str, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        for each in runs:
            each.see_block(name, args, kwargs, _first(output))

    @torch.no_grad()
    def end(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal calls
        dense = _first(output)
        sigma, following = (float(x) for x in pipe.scheduler.sigmas[calls : calls + 2])
        # Of a velocity, noise has a share of 1 / sqrt(sigma^2 + 1).
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        move = (following - sigma) / ((sigma * sigma + 1) ** 0.5 if velocity else 1.0)
        calls += 1
        for each in runs:
            after_forward(each.parts)
            each.see_step(args, kwargs, dense, guidance if len(dense) > images else 0.0, move)

    with ExitStack() as hooks:
        hooks.callback(unet.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name, (_, block) in find_spans(unet).items():
            hooks.callback(block.register_forward_hook(partial(end_block, name), with_kwargs=True).remove)
        hooks.callback(unet.register_forward_hook(end, with_kwargs=True).remove)
        yield


def _first(output: Any) -> Tensor:
    """The tensor in what a module of diffusers returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return tensor


def _guided(prediction: Tensor, guidance: float) -> Tensor:
    if not guidance:
        return prediction.float()
    without, with_prompt = prediction.float().chunk(2)
    return without + guidance * (with_prompt - without)


def _norm(tensor: Tensor) -> Tensor:
    """Norm of each element of the batch."""
    norm: Tensor = tensor.float().flatten(1).norm(dim=-1)
    return norm
