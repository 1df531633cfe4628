"""Sums over the attention map, and its largest entries, by Triton kernels: exact, in one pass each, without a map.

Given the log-sum-exp of each row, any tile of the map is one product away: ``A_ij = exp(scale q_i . k_j - lse_i)``. So
each kernel walks over the tiles, makes them in registers, and keeps what it came for. A program owns its columns and
walks down all rows, so nothing is added by several programs and the sums are the same in every run.

Import this only where Triton is; it runs on CUDA, and on the CPU where ``TRITON_INTERPRET=1`` was set before.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm.method.matching import point_to_themselves

# Tensor cores would cut float32 to 10 bits, less than tells two tokens apart; 16 bits they take as they are.
_PRECISIONS = {torch.float32: "ieee", torch.float16: "tf32", torch.bfloat16: "tf32"}


@triton.jit
def _tile(base, index, is_there, stride, WIDTH: tl.constexpr, width):
    """Rows ``index`` of a (tokens, width) tensor, (len(index), WIDTH), zeros where there is nothing."""
    columns = tl.arange(0, WIDTH)
    mask = is_there[:, None] & (columns < width)[None, :]
    return tl.load(base + index[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(queries, keys, scale, PRECISION: tl.constexpr):
    """``scale queries keys^T`` in float32."""
    if PRECISION == "interpreted":  # the interpreter multiplies what bfloat16 looks like as integers
        return scale * tl.dot(queries.to(tl.float32), tl.trans(keys.to(tl.float32)))
    return scale * tl.dot(queries, tl.trans(keys), input_precision=PRECISION)


@triton.jit
def _row_lse(
    q, k, out, scale, heads, rows, columns, width,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(1).to(tl.int64)
    q += image_head // heads * q_batch + image_head % heads * q_head
    k += image_head // heads * k_batch + image_head % heads * k_head
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queries = _tile(q, row, row < rows, q_token, WIDTH, width)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        keys = _tile(k, column, column < columns, k_token, WIDTH, width)
        logits = _logits(queries, keys, scale, PRECISION)
        logits = tl.where((column < columns)[None, :], logits, float("-inf"))
        now = tl.maximum(most, tl.max(logits, 1))
        total = total * tl.exp(most - now) + tl.sum(tl.exp(logits - now[:, None]), 1)
        most = now
    tl.store(out + image_head * rows + row, most + tl.log(total), mask=row < rows)


@triton.jit
def _column_sums(
    q, k, lse, s, out, scale, heads, rows, columns, width,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(1).to(tl.int64)
    q += image_head // heads * q_batch + image_head % heads * q_head
    k += image_head // heads * k_batch + image_head % heads * k_head
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keys = _tile(k, column, column < columns, k_token, WIDTH, width)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        queries = _tile(q, row, row < rows, q_token, WIDTH, width)
        # Where there is no row its share is zero, whatever the exponential.
        of_row = tl.load(lse + image_head * rows + row, mask=row < rows, other=0.0)
        share = tl.load(s + image_head * rows + row, mask=row < rows, other=0.0)
        logits = _logits(queries, keys, scale, PRECISION)
        total += tl.sum(tl.exp(logits - of_row[:, None]) * share[:, None], 0)
    tl.store(out + image_head * columns + column, total, mask=column < columns)


@triton.jit
def _copy_source(
    q, k, lse, keep, out, scale, heads, rows, kept, columns, width,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    most = tl.full([COLUMNS], -1.0, tl.float32)
    source = tl.zeros([COLUMNS], tl.int64)
    for start in range(0, kept, ROWS):
        place = start + tl.arange(0, ROWS)
        row = tl.load(keep + image * kept + place, mask=place < kept, other=0)
        attention = tl.zeros([ROWS, COLUMNS], tl.float32)
        for head in range(0, heads):
            of_head = image * q_batch + head * q_head
            queries = _tile(q + of_head, row, place < kept, q_token, WIDTH, width)
            of_head = image * k_batch + head * k_head
            keys = _tile(k + of_head, column, column < columns, k_token, WIDTH, width)
            of_row = tl.load(lse + (image * heads + head) * rows + row, mask=place < kept, other=0.0)
            logits = _logits(queries, keys, scale, PRECISION)
            attention += tl.exp(logits - of_row[:, None])
        attention = tl.where((place < kept)[:, None], attention, -1.0)
        here = tl.max(attention, 0)
        where = start + tl.argmax(attention, 0, tie_break_left=True)
        more = here > most  # of equal ones the first stays
        source = tl.where(more, where.to(tl.int64), source)
        most = tl.where(more, here, most)
    tl.store(out + image * columns + column, source, mask=column < columns)


def row_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """As `flash_maps.row_lse` beside this, in any floating dtype. Raises a `ValueError` where Triton does not run."""
    q, k = _ready(q), _ready(k)
    out = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(_row_lse, q.shape[2], q.shape[0] * q.shape[1], q, k, out, scale, q.shape[1], q.shape[2], k.shape[2])
    return out


def column_sums(q: Tensor, k: Tensor, scale: float, lse: Tensor, s: Tensor) -> Tensor:
    """As `flash_maps.column_sums` beside this. Raises a `ValueError` where Triton does not run."""
    q, k = _ready(q), _ready(k)
    out = q.new_empty(k.shape[:3], dtype=torch.float32)
    given = (lse.contiguous(), s.contiguous(), out, scale, q.shape[1], q.shape[2], k.shape[2])
    _launch(_column_sums, k.shape[2], q.shape[0] * q.shape[1], q, k, *given)
    return out


def copy_source(q: Tensor, k: Tensor, scale: float, lse: Tensor, keep: Tensor) -> Tensor:
    """As `atedm.method.matching.attention_source` on the mean map of the heads.

    Queries and keys are (B, H, N, D), ``lse`` is `row_lse` of them, ``keep`` (B, K) int64. Returns (B, N) int64 places
    within ``keep``, where kept tokens point to themselves. Raises a `ValueError` where Triton does not run.
    """
    q, k, keep = _ready(q), _ready(k), keep.contiguous()
    batch, heads, tokens, _ = k.shape
    out = torch.empty(batch, tokens, dtype=torch.int64, device=k.device)
    given = (lse.contiguous(), keep, out, scale, heads, q.shape[2], keep.shape[1], tokens)
    _launch(_copy_source, tokens, batch, q, k, *given)
    return point_to_themselves(out, keep)


def _launch(kernel: Any, side: int, images: int, q: Tensor, k: Tensor, *given: Any) -> None:
    """Run a program for each tile of ``side`` and each of ``images``, on the device of ``q``, current or not."""
    on_cuda, width = q.device.type == "cuda", q.shape[3]
    tile = tile_of(width, q.element_size())
    precision = _PRECISIONS[q.dtype] if on_cuda else "interpreted"
    constants = {"WIDTH": width_of(width), "ROWS": tile, "COLUMNS": tile, "PRECISION": precision}
    with torch.cuda.device(q.device) if on_cuda else nullcontext():
        kernel[triton.cdiv(side, tile), images](q, k, *given, width, *q.stride()[:3], *k.stride()[:3], **constants)


def _ready(x: Tensor) -> Tensor:
    """In a dtype that Triton multiplies, with the width innermost."""
    if x.device.type != "cuda" and isinstance(_row_lse, triton.JITFunction):
        raise ValueError(
            f"map_mode 'triton' runs on CUDA, not on {x.device.type}; use 'auto', which picks what runs anywhere"
        )
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_of(width: int, bytes_each: int) -> int:
    """Rows and columns of the tile that a program makes at once: what its queries and keys leave room for."""
    row = bytes_each * width_of(width)
    return 64 if row <= 256 else 32 if row <= 512 else 16


def width_of(width: int) -> int:
    """``width`` as kernels take it: a power of two that tensor cores know."""
    return max(16, int(triton.next_power_of_2(width)))
