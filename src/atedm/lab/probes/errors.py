"""Where pruning errs, and how the errors of a run add up: measured along dense runs, so that no error causes another.

At every step a pruned copy of the U-Net is given what the dense one was given. A block's error is what it adds in place
of what the dense block adds to the same features. A step's error is that of the guided prediction; under an Euler
scheduler it moves the image in proportion, so the moves of all steps have a sum. If errors were independent, the sum
would grow as the root of their squares does; if they were equal, as they do.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from atedm.hosts.diffusers_unet import after_forward, before_forward
from atedm.hosts.unet_spans import find_spans
from atedm.lab.evaluation.images import Drawing
from atedm.lab.probes.dense_runs import dense_spans, draw_dense
from atedm.lab.progress import Progress, silent
from atedm.lab.shared_weights import copy_with_shared_weights
from atedm.lab.tables import markdown_table
from atedm.method.contract import Method
from atedm.patch import apply

_PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class MethodErrors:
    """Errors of one way to prune, averaged over images as a root of mean squares."""

    name: str
    blocks: Mapping[str, tuple[float, ...]]  #: By block, each step's error of what the block adds, relative to it.
    steps: tuple[float, ...]  #: Each step's error of the guided prediction, relative to it.
    #: After each step, how far the image has been moved by all errors so far, relative to the final image.
    moved: tuple[float, ...]
    moved_if_independent: tuple[float, ...]  #: The same if errors of different steps were independent.
    successive: float  #: Mean cosine between the errors of one step and the next.


@dataclass(frozen=True)
class ErrorsReport:
    """All methods over the same images."""

    methods: tuple[MethodErrors, ...]
    levels: Mapping[str, int]  #: Feature level by block.
    images: int
    steps: int

    def of_level(self, method: MethodErrors, level: int) -> float:
        """Root of the mean square over the blocks of a level and all steps; nan if none is there."""
        blocks = [steps for name, steps in method.blocks.items() if self.levels[name] == level]
        return root_mean_square([*chain(*blocks)])

    def table(self) -> str:
        """Show a line a method."""
        levels = sorted(set(self.levels.values()))
        head = ["method", *(f"block, level {level}" for level in levels), "step", "one step and the next"]
        rows = []
        for one in self.methods:
            blocks = (f"{self.of_level(one, level):.3f}" for level in levels)
            moved = (f"{one.moved[-1]:.4f}", f"{one.moved_if_independent[-1]:.4f}")
            rows.append([one.name, *blocks, f"{root_mean_square(one.steps):.4f}", f"{one.successive:.2f}", *moved])
        return markdown_table([*head, "image moved", "if independent"], rows)


def root_mean_square(values: Sequence[float]) -> float:
    """Root of the mean of squares; nan of no values."""
    return (sum(value * value for value in values) / len(values)) ** 0.5 if values else float("nan")


def find_errors(
    pipe: Any, prompts: Sequence[str], methods: Mapping[str, Method], drawing: Drawing, *, progress: Progress = silent
) -> ErrorsReport:
    """Draw prompts dense, and prune beside.

    Raises as `dense_spans` and `draw_dense`, or a `ValueError` if no method is named, or the scheduler is not one whose
    steps sum up to a move.
    """
    if not methods:
        raise ValueError("there must be at least one way to prune")
    levels = {name: place.level for name, (place, _) in dense_spans(pipe).items()}
    prediction = pipe.scheduler.config.get("prediction_type")
    if not isinstance(pipe.scheduler, EulerDiscreteScheduler) or prediction not in _PREDICTIONS:
        raise ValueError(
            f"errors of steps sum up under an EulerDiscreteScheduler that predicts {' or '.join(_PREDICTIONS)}, not "
            f"under a {type(pipe.scheduler).__name__} that predicts {prediction}"
        )
    runs = {name: _PrunedBeside(pipe.unet, method) for name, method in methods.items()}
    watch = partial(_beside, pipe, [*runs.values()], drawing.guidance)
    for latents in draw_dense(pipe, prompts, drawing, watch, progress=progress):
        for each in runs.values():
            each.end_images(latents)
    found = tuple(each.errors(name) for name, each in runs.items())
    return ErrorsReport(found, levels, len(prompts), drawing.steps)


class _PrunedBeside:
    """Two pruned U-Nets that share the weights of a dense one: one runs whole, of the other single blocks."""

    def __init__(self, unet: UNet2DConditionModel, method: Method) -> None:
        self.whole, self.parts = (copy_with_shared_weights(unet) for _ in range(2))
        for copied in (self.whole, self.parts):
            apply(copied, method)
        # By block and by figure: squares (steps, images) of each batch that is done, and steps of the one being drawn.
        self._done: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._drawn: defaultdict[str, list[Tensor]] = defaultdict(list)

    def see_block(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Run one block on what the dense one was given."""
        if name in self.parts._atedm.spans:
            start = args[0] if args else kwargs["hidden_states"]
            pruned = _first(self.parts.get_submodule(name)(*args, **kwargs))
            self._drawn[name].append(_norm(pruned - output) / _norm(output - start))

    def see_step(self, args: Any, kwargs: Any, dense: Tensor, guidance: float, move: float) -> None:
        """Run all of it on what the dense one was given."""
        expected = _guided(dense, guidance)
        error = _guided(_first(self.whole(*args, **kwargs)), guidance) - expected
        self._drawn["error"].append(error.flatten(1))
        self._drawn["move"].append(move * error.flatten(1))
        self._drawn["relative"].append(_norm(error) / _norm(expected))

    def end_images(self, latents: Tensor) -> None:
        """Add up what was seen of one batch of images, of which ``latents`` came."""
        size = _norm(latents)
        errors, moves, relative = (torch.stack(self._drawn.pop(name)) for name in ("error", "move", "relative"))
        found = {
            "moved": (moves.cumsum(0).norm(dim=-1) / size).square(),
            "independent": moves.square().sum(-1).cumsum(0) / size.square(),
            "steps": relative.square(),
            "successive": functional.cosine_similarity(errors[:-1], errors[1:], dim=-1, eps=1e-12),
        }
        for name, of_block in self._drawn.items():  # both halves of guidance count alike
            found[name] = torch.unflatten(torch.stack(of_block).square(), -1, (-1, len(latents))).mean(1)
        for name, values in found.items():
            self._done[name].append(values.cpu())
        self._drawn.clear()

    def errors(self, name: str) -> MethodErrors:
        """Give the roots of the mean squares."""
        done = {what: torch.cat(batches, -1) for what, batches in self._done.items()}
        cosines = done.pop("successive")
        roots = {what: tuple(squares.mean(-1).sqrt().tolist()) for what, squares in done.items()}
        moved, independent, steps = (roots.pop(what) for what in ("moved", "independent", "steps"))
        return MethodErrors(name, roots, steps, moved, independent, float(cosines.mean()) if cosines.numel() else 0.0)


@contextmanager
def _beside(pipe: Any, runs: Sequence[_PrunedBeside], guidance: float, images: int) -> Iterator[None]:
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
    return output[0] if isinstance(output, tuple) else output.sample  # type: ignore[no-any-return]


def _guided(prediction: Tensor, guidance: float) -> Tensor:
    if not guidance:
        return prediction.float()
    without, with_prompt = prediction.float().chunk(2)
    return without + guidance * (with_prompt - without)


def _norm(tensor: Tensor) -> Tensor:
    """Norm of each element of the batch."""
    return tensor.float().flatten(1).norm(dim=-1)  # type: ignore[no-any-return]
