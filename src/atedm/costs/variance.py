"""How much attention maps tell tokens apart: their variance, step by step (main paper, Fig. 5; supplement C.4).

A map whose entries are all alike ranks no token above another. The paper finds the variance above 1e-5 after the first
15 of 50 denoising steps, and for that reason prunes less in those 15. Measured here on any dense pipeline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention as AttentionModule
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from atedm.attention_map import attention_maps, empty_map
from atedm.config import PruningConfig
from atedm.generate import Progress
from atedm.patching.apply import is_applied
from atedm.patching.pruning_layer import queries_and_keys
from atedm.patching.survey import find_blocks, find_unet
from atedm.request import Request

THRESHOLD = 1e-5
"""The variance that the paper finds exceeded after its prune-less steps (supplement C.4)."""

PRUNE_LESS_SHARE = 0.3
"""Those steps as a share of the run: 15 of 50."""


@dataclass(frozen=True)
class BlockVariance:
    """Variance of the entries of one block's first attention map in one denoising step, averaged over the images."""

    #: Counted from 0.
    step: int
    block: str
    #: Feature level, counted from 1, the finest.
    level: int
    #: N; the map is N x N.
    tokens: int
    #: Of each head's map, averaged over heads and batch.
    per_head: float
    #: Of the head-mean map, averaged over the batch.
    head_mean: float

    @property
    def relative_per_head(self) -> float:
        """``N^2 per_head``: entries average 1 / N, so this compares blocks of different sizes."""
        return self.tokens**2 * self.per_head

    @property
    def relative_head_mean(self) -> float:
        """``N^2 head_mean``."""
        return self.tokens**2 * self.head_mean


@dataclass(frozen=True)
class VarianceReport:
    """The variance of every block in every step, and how the images were made."""

    rows: tuple[BlockVariance, ...]
    #: Names of the attention blocks, in the order they run.
    blocks: tuple[str, ...]
    prompts: tuple[str, ...]
    steps: int
    guidance: float
    seed: int
    scheduler: str
    dtype: str

    def mean_by_step(self, field: str = "per_head") -> list[float]:
        """Return the mean over the blocks, one a step.

        Args:
            field: "per_head", "head_mean", "relative_per_head" or "relative_head_mean".
        """
        return _by_step(self.rows, self.steps, field)

    def mean_by_level(self, field: str = "per_head") -> dict[int, list[float]]:
        """Return the mean over the blocks of each level, one a step; levels ascend.

        Args:
            field: As `mean_by_step`.
        """
        levels = sorted({row.level for row in self.rows})
        return {level: _by_step([r for r in self.rows if r.level == level], self.steps, field) for level in levels}

    def first_step_above(self, threshold: float = THRESHOLD) -> int | None:
        """Return the first step whose mean over the blocks exceeds ``threshold``, whatever comes after it.

        Counted from 0, so it is also the number of steps before it; None if no step does.
        """
        return next((step for step, mean in enumerate(self.mean_by_step()) if mean > threshold), None)

    def as_dict(self, threshold: float = THRESHOLD) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            **asdict(self),
            "threshold": threshold,
            "first_step_above": self.first_step_above(threshold),
            "mean_by_step": self.mean_by_step(),
            "relative_mean_by_step": self.mean_by_step("relative_per_head"),
            "mean_by_level": {str(level): means for level, means in self.mean_by_level().items()},
            "relative_mean_by_level": {
                str(level): means for level, means in self.mean_by_level("relative_per_head").items()
            },
        }


def _by_step(rows: Sequence[BlockVariance], steps: int, field: str) -> list[float]:
    values = [[float(getattr(row, field)) for row in rows if row.step == step] for step in range(steps)]
    return [sum(of_step) / len(of_step) for of_step in values]


def map_variance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Variance of the entries of an attention map, around their own mean, in two ways.

    Args:
        q: Queries, (B, H, N, D), any floating dtype.
        k: Keys, (B, H, N, D).
        scale: The factor on the logits.

    Returns:
        (2,) float32: of each head's map, averaged over heads and batch; and of the head-mean map, averaged over the
        batch. Never more than one head's map and the mean are held.

    Raises:
        ValueError: As `attention_maps`.
    """
    heads = q.shape[1]
    mean_map = empty_map(q, k)
    per_head = mean_map.new_zeros(())
    for a in attention_maps(q, k, scale):
        per_head += _entry_variance(a) / heads
        mean_map.add_(a, alpha=1 / heads)
        del a  # or it lives on while the next head is computed
    return torch.stack([per_head, _entry_variance(mean_map)])


def _entry_variance(maps: Tensor) -> Tensor:
    """Variance of the entries of each (N, N) map, averaged over the batch."""
    # Not mean(a^2) - mean(a)^2: 1e-9 between two numbers of about 1e-7 is lost in float32.
    return maps.flatten(1).var(-1, unbiased=False).mean()


def attention_variance(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VarianceReport:
    """Make one image a prompt, dense, and measure the first attention map of every block on the way.

    The images are what they would be without measuring, and are not decoded. Image i has seed ``seed + i``.

    Args:
        pipe: A text-to-image pipeline with a U-Net, not patched and not compiled.
        prompts: One image each.
        steps: Denoising steps. Where the scheduler calls the U-Net more often (Heun), calls are spread over the steps
            in their order and averaged within each.
        guidance: Guidance scale; with guidance the unprompted half of the batch counts like the prompted.
        width: In pixels; None leaves it to the pipeline.
        height: In pixels.
        seed: Of the first image.
        progress: Told of every call of the U-Net.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled, has no attention blocks, or an argument is out of its range.
    """
    # The checks of every other image; the config plays no part.
    request = Request(tuple(prompts), PruningConfig(), steps, guidance, width, height, seed)
    unet = find_unet(pipe)
    if is_applied(unet):
        raise ValueError("this U-Net is patched, and the variance is measured dense; call atedm.remove(...) first")
    if unet is not pipe.unet:
        raise ValueError("this U-Net is compiled, which passes over the hooks that measure; use it as it was before")
    blocks = find_blocks(unet)
    if not blocks:
        raise ValueError("this U-Net has no attention blocks (Transformer2DModel), so there is nothing to measure")
    calls: defaultdict[tuple[int, str], list[list[float]]] = defaultdict(list)
    tokens: dict[str, int] = {}
    with measured({name: module for name, (_, module) in blocks.items()}) as latest:

        def end_call(_: Any, call: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            count = len(pipe.scheduler.timesteps)
            for block, (tokens[block], variance) in latest.items():
                calls[call * steps // count, block].append(variance.tolist())
            if progress is not None:
                progress(f"image {index}", call + 1, count)
            return kwargs

        for index, prompt in enumerate(request.prompts):
            pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                generator=torch.Generator("cpu").manual_seed(seed + index),
                output_type="latent",
                callback_on_step_end=end_call,
            )
    rows = [
        BlockVariance(step, name, place.level, tokens[name], *_mean(calls[step, name]))
        for step in range(steps)
        for name, (place, _) in blocks.items()
    ]
    return VarianceReport(
        rows=tuple(rows),
        blocks=tuple(blocks),
        prompts=request.prompts,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=type(pipe.scheduler).__name__,
        dtype=str(unet.dtype).removeprefix("torch."),
    )


def _mean(calls: Sequence[Sequence[float]]) -> tuple[float, float]:
    per_head, head_mean = (sum(values) / len(calls) for values in zip(*calls, strict=True))
    return per_head, head_mean


@contextmanager
def measured(blocks: Mapping[str, Transformer2DModel]) -> Iterator[dict[str, tuple[int, Tensor]]]:
    """Measure the first self-attention of ``blocks`` in every call of their U-Net inside a ``with`` block.

    Yields:
        By block, N and the `map_variance` of the latest call.

    Raises:
        ValueError: In the call, if the first layer of a block attends to the words in place of its own tokens.
    """
    latest: dict[str, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def measure(block: str, attention: AttentionModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("encoder_hidden_states") is not None:
            raise ValueError(f"the first layer of {block} has no self-attention, so there is no map to measure")
        tokens = args[0] if args else kwargs["hidden_states"]
        # What self-attention is handed has been through its norm already.
        latest[block] = (tokens.shape[1], map_variance(*queries_and_keys(attention, nn.Identity(), tokens)))

    with ExitStack() as hooks:
        for name, module in blocks.items():
            attention = module.transformer_blocks[0].attn1
            hooks.callback(attention.register_forward_pre_hook(partial(measure, name), with_kwargs=True).remove)
        yield latest
