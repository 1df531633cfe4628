"""What each part of AT-EDM takes, beside a dense step: supplement Fig. 4, on the machine at hand.

The parts are the package's own functions, one after another: get the map, rank, mask, drop, fill. The way to the
attention map is what differs. They are timed on random tokens in one block of each shape, and multiplied by how often a
run prunes such blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from atedm.costs.architectures import architecture, run_once
from atedm.costs.spans import early_steps, span_shape
from atedm.hosts.attention import queries_and_keys
from atedm.hosts.unet_spans import choose_spans, find_spans
from atedm.lab.ablation.map_modes import scores_by
from atedm.lab.progress import Progress, silent
from atedm.lab.random_unet import random_unet
from atedm.lab.setup import Setup
from atedm.lab.tables import markdown_table
from atedm.lab.timing import Spread, Stopwatch
from atedm.method.at_edm import AtEdm
from atedm.method.attention_map import empty_map, maps_in_turn
from atedm.method.contract import Place, QueriesAndKeys, View
from atedm.method.gwpr import gwpr, root_mean_square
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.map_scores import Scores
from atedm.method.matching import attention_source
from atedm.method.recovery import similarity_copy
from atedm.words import check_whole

PARTS = ("get map", "rank", "mask", "drop", "fill")
"""The bars of supplement Fig. 4."""
WITHOUT_MAP = ("blocked", "flash", "triton", "sampled")
"""Map modes that never hold the map: "get map" is all of the ranking, "fill" makes rows once more."""
WAYS = ("head-by-head", "all-heads", *WITHOUT_MAP)
"""Ways to the attention map that are timed."""
PAPER = {
    "paper": dict(zip(PARTS, (1961.0, 1275.0, 317.0, 91.0, 275.0), strict=True)),
    "dagger": dict(zip(PARTS, (256.0, 160.0, 78.0, 48.0, 132.0), strict=True)),
}
"""The paper's ms a run of 50 steps of SD-XL on one A100 (supplement Fig. 4), by method."""
_MOST_BYTES = 8 * 2**30
"""Of the maps of all heads, which are not made if they would take more."""

#: Told the part that what was done since the last lap belongs to.
Lap: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class PrunedShape:
    """Pruned blocks of one shape."""

    tokens: int
    kept: int  #: Tokens left.
    channels: int
    heads: int
    place: Place  #: One of the blocks.
    #: How often such a block is pruned in a run: blocks times steps, less the steps in which they are spared.
    times: int


@dataclass(frozen=True)
class LatencyReport:
    """The time of each part, of a dense step, and everything they depend on."""

    setup: Setup
    method: dict[str, Any]
    steps: int
    dense_step: Spread  #: A dense call of the U-Net with random weights, in milliseconds.
    shapes: tuple[PrunedShape, ...]
    ways: dict[str, dict[str, float]]  #: Milliseconds a run by way to the attention map and part.
    left_out: dict[str, str]  #: Ways that were left out, and why.

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

    def text(self, paper: str) -> str:
        """Show the parts, one a row; beside the paper's own figures where ``paper`` names one of its methods."""
        runs = {name: run | {"all": sum(run.values())} for name, run in self.ways.items()}
        theirs = PAPER.get(paper, {})
        rows = []
        for part in (*PARTS, "all"):
            times = [f"{run[part]:.1f} ({run[part] / self.dense_run:.1%})" for run in runs.values()]
            rows.append([part, *times, *([f"{theirs.get(part, sum(theirs.values())):.0f}"] if theirs else [])])
        head = ["ms a run", *runs, *(["paper, one A100"] if theirs else [])]
        lines = [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        lines.append(f"a dense step: {self.dense_step.text()} ms; a dense run: {self.dense_run / 1e3:.2f} s")
        return "\n".join([self.headline(), "", markdown_table(head, rows), "", *lines])


def latency(setup: Setup, method: Any, steps: int = 50, progress: Progress = silent) -> LatencyReport:
    """Time the parts of AT-EDM and the dense U-Net, with random weights.

    ``method`` is an `AtEdm` without functions of one's own; the parts add up over a run of ``steps``. Times are medians
    over rounds. Each round times everything once, so that what else the machine does meets all alike. Raises a
    `ValueError` if the method is another one, ``steps`` is below 1, or there is nothing to prune.
    """
    if not isinstance(method, AtEdm) or method.rank is not None or method.refill is not None:
        raise ValueError(f"the parts of AT-EDM are timed, with its own ranking and copy, not those of {method!r}")
    check_whole("steps", steps)
    shapes = pruned_shapes(setup, method, steps)  # before any work: refuses what cannot be pruned
    unet = random_unet(architecture(setup.model), setup.torch_dtype, setup.device)
    call = setup.call()
    left_out = {name: why for name in WAYS if (why := why_not(name, shapes, len(call["sample"]), unet))}
    ways = [name for name in WAYS if name not in left_out]

    @torch.no_grad()
    def one_round() -> dict[tuple[str, int], dict[str, float]]:
        """Time every way in one block of each shape, and a dense step: milliseconds of the parts."""
        generator = torch.Generator("cpu").manual_seed(0)
        times = {}
        for index, shape in enumerate(shapes):
            tokens = torch.randn(len(call["sample"]), shape.tokens, shape.channels, generator=generator)
            tokens = tokens.to(unet.device, unet.dtype)
            layer = unet.get_submodule(shape.place.name).transformer_blocks[0]
            for way in ways:
                watch = Stopwatch(unet.device)
                prune_once(layer, tokens, shape.place, shape.kept, method.iterations, way, watch.lap)
                times[way, index] = watch.read()
        watch = Stopwatch(unet.device)
        run_once(unet, call, 1)
        watch.lap("step")
        return times | {("dense", 0): watch.read()}

    rounds = []
    for done in range(setup.repeats + 1):
        rounds.append(one_round())
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
    """Group the pruned blocks by shape with how often a run prunes them, or raise a `ValueError` if there are none."""
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


def head_by_head(attention: QueriesAndKeys, iterations: int, lap: Lap) -> Scores:
    """Rank by one head's map at a time, as the package does."""
    mean_map = empty_map(attention.q, attention.k)
    per_head = []
    for a in maps_in_turn(*attention):
        mean_map.add_(a, alpha=1 / attention.q.shape[1])
        lap("get map")
        per_head.append(gwpr(a, iterations=iterations))
        lap("rank")
        del a  # or it lives on while the next head is computed
    importance = root_mean_square(torch.stack(per_head))
    lap("rank")
    return Scores(importance, partial(attention_source, mean_map))


def all_heads(attention: QueriesAndKeys, iterations: int, lap: Lap) -> Scores:
    """Rank by the maps of all heads at once, (B, H, N, N): one product, one softmax, and the memory for them."""
    q, k, scale = attention
    maps = torch.softmax((scale * q) @ k.mT, dim=-1, dtype=torch.float32)
    mean_map = maps.mean(1)
    lap("get map")
    importance = root_mean_square(gwpr(maps, iterations=iterations).transpose(0, 1))
    lap("rank")
    del maps
    lap("get map")  # giving that much memory back takes a while too
    return Scores(importance, partial(attention_source, mean_map))


@torch.no_grad()
def prune_once(
    layer: Any, tokens: Tensor, place: Place, count: int, iterations: int, way: str, lap: Lap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what AT-EDM adds to a block, and nothing else of it: importance, which tokens are kept, they, and all filled.

    ``layer`` is the first one of the block at ``place``, ``tokens`` (B, N, C) are what reaches it, and the same stand
    for those after it, which only have to be of that size. ``count`` are kept. ``lap`` is called after each part.
    """
    attention = partial(queries_and_keys, layer.attn1, layer.norm1, tokens)
    if way in WITHOUT_MAP:
        # One row of tokens: which rows are sampled makes no difference to the time.
        view = View(place, (1, tokens.shape[1]), count, 0, tokens, attention, attention)
        scores = scores_by(way, view, head_fusion="rms", iterations=iterations, rows=256)
        lap("get map")
        lap("rank")  # in one with it
    else:
        scores = (head_by_head if way == "head-by-head" else all_heads)(attention(), iterations, lap)
    assert scores.importance is not None
    keep = keep_most_important(scores.importance, count)
    lap("mask")
    kept = gather_tokens(tokens, keep)
    lap("drop")
    filled = similarity_copy(kept, scores.source(keep))
    lap("fill")
    return scores.importance, keep, kept, filled
