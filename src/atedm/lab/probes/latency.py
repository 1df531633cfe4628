"""What each part of AT-EDM takes, beside a dense step: supplement Fig. 4, on the machine at hand.

The parts are timed on random tokens in one block of each shape, and multiplied by how often a run prunes such blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from atedm.costs.architectures import architecture, run_once
from atedm.costs.spans import early_steps, span_shape
from atedm.hosts.unet_spans import choose_spans, find_spans
from atedm.lab.probes.pruning_parts import PARTS, WAYS, prune_once
from atedm.lab.progress import Progress, silent
from atedm.lab.random_unet import random_unet
from atedm.lab.setup import Setup
from atedm.lab.timing import Spread, Stopwatch
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Place
from atedm.words import check_whole

PAPER = {
    "paper": dict(zip(PARTS, (1961.0, 1275.0, 317.0, 91.0, 275.0), strict=True)),
    "dagger": dict(zip(PARTS, (256.0, 160.0, 78.0, 48.0, 132.0), strict=True)),
}
"""The paper's ms a run of 50 steps of SD-XL on one A100 (supplement Fig. 4), by method."""
_MOST_BYTES = 8 * 2**30
"""Of the maps of all heads, which are not made if they would take more."""


@dataclass(frozen=True)
class PrunedShape:
    """Pruned blocks of one shape."""

    tokens: int
    #: Tokens left.
    kept: int
    channels: int
    heads: int
    #: One of the blocks.
    place: Place
    #: How often such a block is pruned in a run: blocks times steps, less the steps in which they are spared.
    times: int


@dataclass(frozen=True)
class LatencyReport:
    """The time of each part, of a dense step, and everything they depend on."""

    setup: Setup
    method: dict[str, Any]
    steps: int
    #: A dense call of the U-Net with random weights, in milliseconds.
    dense_step: Spread
    shapes: tuple[PrunedShape, ...]
    #: Milliseconds a run by way to the attention map and part.
    ways: dict[str, dict[str, float]]
    #: Ways that were left out, and why.
    left_out: dict[str, str]

    @property
    def dense_run(self) -> float:
        """Milliseconds of the U-Net calls of a dense run."""
        return self.steps * self.dense_step.median

    def headline(self) -> str:
        """Say in one line what was timed on what."""
        return f"{self.steps} steps of {self.setup}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {"dense_run": self.dense_run}


def latency(setup: Setup, method: Any, steps: int = 50, progress: Progress = silent) -> LatencyReport:
    """Time the parts of AT-EDM and the dense U-Net, with random weights.

    Times are medians over the rounds. Each round times everything once, so that what else the machine does meets all
    alike.

    ``method`` is an `AtEdm` without functions of one's own; the parts add up over a run of ``steps``.

    Raises:
        ValueError: If the method is another one, ``steps`` is below 1, or there is nothing to prune.
    """
    if not isinstance(method, AtEdm) or method.rank is not None or method.refill is not None:
        raise ValueError(f"the parts of AT-EDM are timed, with its own ranking and copy, not those of {method!r}")
    check_whole("steps", steps)
    shapes = pruned_shapes(setup, method, steps)  # before any work: refuses what cannot be pruned
    unet = random_unet(architecture(setup.model), setup.torch_dtype, setup.device)
    call = setup.call()
    left_out = {name: why for name in WAYS if (why := why_not(name, shapes, len(call["sample"]), unet))}
    ways = [name for name in WAYS if name not in left_out]
    rounds = []
    for done in range(setup.repeats + 1):
        rounds.append(_round(unet, call, shapes, method.iterations, ways))
        progress("rounds", done + 1, setup.repeats + 1)
    counted = rounds[1:]
    found = {
        name: {
            part: sum(s.times * median(times[name, i][part] for times in counted) for i, s in enumerate(shapes))
            for part in PARTS
        }
        for name in ways
    }
    dense = Spread.of([times["dense", 0]["step"] for times in counted])
    return LatencyReport(setup, method.as_dict(), steps, dense, shapes, found, left_out)


def pruned_shapes(setup: Setup, method: AtEdm, steps: int) -> tuple[PrunedShape, ...]:
    """Group the pruned blocks by shape, and count how often they are pruned in a run.

    Raises:
        ValueError: If there is nothing to prune.
    """
    arch = architecture(setup.model)
    unet, early = arch.on_meta(), early_steps(method, steps)
    found: dict[tuple[int, int, int, int], PrunedShape] = {}
    for place, _ in choose_spans(find_spans(unet), method).values():
        shape = span_shape(unet, place, arch.latents(setup.size), arch.words)
        kept, kept_early = (method.count(place, shape.tokens, early=kind) for kind in (False, True))
        if kept < shape.tokens:
            key = (shape.tokens, kept, shape.channels, shape.heads)
            before = found[key].times if key in found else 0
            found[key] = PrunedShape(*key, place, before + steps - early * (kept_early == shape.tokens))
    if not found:
        raise ValueError(f"there is nothing to time: at a rate of {method.rate} no token is dropped")
    return tuple(found.values())


def why_not(way: str, shapes: Sequence[PrunedShape], batch: int, unet: UNet2DConditionModel) -> str:
    """Say why a way is left out: it does not run here, or takes too much memory; "" if there is no reason."""
    kind = unet.device.type
    if way == "triton" and kind != "cuda":
        return "its kernels run on CUDA"
    if way == "flash" and kind not in ("cpu", "cuda"):
        return f"torch has no fused attention with log-sum-exps on {kind}"
    largest = max(batch * shape.heads * shape.tokens**2 for shape in shapes)
    needed = largest * (4 + unet.dtype.itemsize)  # the product, and its softmax in float32
    if way == "all-heads" and needed > _MOST_BYTES:
        return f"the maps of all heads take {needed / 2**30:.1f} GiB"
    return ""


@torch.no_grad()
def _round(
    unet: UNet2DConditionModel,
    call: dict[str, Any],
    shapes: Sequence[PrunedShape],
    iterations: int,
    ways: Sequence[str],
) -> dict[tuple[str, int], dict[str, float]]:
    """Time every way in one block of each shape, and a dense step: milliseconds of the parts."""
    generator = torch.Generator("cpu").manual_seed(0)
    times = {}
    for index, shape in enumerate(shapes):
        tokens = torch.randn(len(call["sample"]), shape.tokens, shape.channels, generator=generator)
        tokens = tokens.to(unet.device, unet.dtype)
        layer = unet.get_submodule(shape.place.name).transformer_blocks[0]
        for way in ways:
            watch = Stopwatch(unet.device)
            prune_once(layer, tokens, shape.place, shape.kept, iterations, way, watch.lap)
            times[way, index] = watch.read()
    watch = Stopwatch(unet.device)
    run_once(unet, call, 1)
    watch.lap("step")
    times["dense", 0] = watch.read()
    return times
