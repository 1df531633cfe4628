"""Ways to what the self-attention map is wanted for, of which the methods use two.

Beside the whole map, blocks of it and a sample of its rows (`atedm.method.map_scores`): ``flash`` leaves the iterations
of G-WPR to stock flash attention, ``triton`` has kernels of its own for all of it, on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from atedm.lab.ablation import flash_maps, plain_maps
from atedm.lab.ablation.controls import uniform_random
from atedm.method.attention_map import mean_attention_map, without_autocast
from atedm.method.contract import View
from atedm.method.cover import lattice
from atedm.method.gwpr import gwpr, normalise, root_mean_square
from atedm.method.keep import keep_most_important
from atedm.method.map_scores import (
    WHOLE_MAP_TOKENS,
    Scores,
    scores_in_blocks,
    scores_of_map,
    scores_of_rows,
    source_in_blocks,
)
from atedm.method.matching import attention_source

#: "auto" is "full" up to 1,024 tokens and "sampled" above.
MAP_MODES = ("auto", "full", "blocked", "flash", "triton", "sampled")
#: How heads become one: the root mean square of their rankings, or one ranking of their mean map.
HEAD_FUSIONS = ("rms", "mean-map")


def scores_by(mode: str, view: View, *, head_fusion: str, iterations: int, rows: int) -> Scores:
    """Rank and find copy sources in one of `MAP_MODES`.

    ``head_fusion`` is one of `HEAD_FUSIONS`, of which "mean-map" always makes the whole map; ``iterations`` of G-WPR
    are 0 where only the copy is wanted; ``rows`` are sampled. Raises an `ImportError` if Triton is asked for and not
    installed, and a `ValueError` if it, or flash attention that gives log-sum-exps, does not run on the device.
    """
    attention = view.self_attention()
    tokens = attention.k.shape[2]
    if head_fusion == "mean-map" and iterations:
        mean_map = mean_attention_map(*attention)
        return Scores(gwpr(mean_map, iterations=iterations), functools.partial(attention_source, mean_map))
    if mode == "full" or (mode == "auto" and tokens <= WHOLE_MAP_TOKENS):
        return scores_of_map(*attention, iterations=iterations)
    if mode in ("auto", "sampled"):
        return scores_of_rows(*attention, _sampled_rows(view, tokens, rows), iterations=iterations)
    ways = {"blocked": scores_in_blocks, "flash": scores_by_flash, "triton": scores_by_triton}
    return ways[mode](*attention, iterations=iterations)


def _sampled_rows(view: View, tokens: int, rows: int) -> Tensor:
    device = view.tokens.device
    if view.size[0] * view.size[1] == tokens:
        spread = lattice(view.size, step=view.step, device=device).unsqueeze(0)
    else:  # some tokens are gone already
        spread = uniform_random(1, tokens, seed=0, step=view.step, device=device)
    return keep_most_important(spread, min(rows, tokens))[0]


def scores_by_flash(q: Tensor, k: Tensor, scale: float, *, iterations: int) -> Scores:
    """As `scores_in_blocks`, with the iterations left to stock flash attention, and raising as `flash_maps.row_lse`."""
    lse = flash_maps.row_lse(q, k, scale) if iterations else None
    importance = _passed_on(flash_maps.column_sums, q, k, scale, lse, iterations)
    return Scores(importance, functools.partial(source_in_blocks, q, k, scale))


def scores_by_triton(q: Tensor, k: Tensor, scale: float, *, iterations: int) -> Scores:
    """As `scores_in_blocks`, by Triton kernels. On the meta device plain products take their place, to be counted.

    Raises an `ImportError` if Triton is not installed, and a `ValueError` if the tensors are not where it runs.
    """
    maps: Any = plain_maps
    if q.device.type != "meta":
        try:
            maps = import_module("atedm.lab.ablation.triton_maps")
        except ImportError as error:
            raise ImportError(
                "map_mode 'triton' needs the triton package, which torch for CUDA on Linux brings along; "
                "use 'auto', which picks what runs anywhere"
            ) from error
    lse = maps.row_lse(q, k, scale)
    importance = _passed_on(maps.column_sums, q, k, scale, lse, iterations)
    return Scores(importance, functools.partial(maps.copy_source, q, k, scale, lse))


def _passed_on(
    column_sums: Callable[..., Tensor], q: Tensor, k: Tensor, scale: float, lse: Tensor | None, iterations: int
) -> Tensor:
    """Importance (B, N) by G-WPR, where a pass over the map is one call of ``column_sums``."""
    batch, heads, tokens, _ = q.shape
    s = q.new_full((batch, heads, tokens), 1 / tokens, dtype=torch.float32)
    with without_autocast(q.device):
        for _ in range(iterations):
            s = normalise(column_sums(q, k, scale, lse, s))
    return root_mean_square(s.transpose(0, 1))
