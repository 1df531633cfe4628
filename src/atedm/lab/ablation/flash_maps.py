"""Sums over the attention map by stock flash attention, of which only the log-sum-exp of each row is kept.

With ``lse_i = logsumexp_j(scale q_i . k_j)`` a map is ``A_ij = exp(scale q_i . k_j - lse_i)``, and what importance
``s`` passes along it is

    (A^T s)_j = exp(logsumexp_i(scale k_j . q_i + log s_i - lse_i)),

the log-sum-exp of attention with queries and keys swapped and a bias on each key. Fused attention computes it beside
its output and never holds a row of the map. Not every kernel takes a bias, so it rides in the product: the keys get a
few more columns that hold it, and the queries ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

COLUMNS = 8
"""How much wider the bias makes queries and keys: kernels ask for widths in eights."""


def row_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``logsumexp_j(scale q_i . k_j)`` of each query, (B, H, M) float32.

    Queries ``q`` (B, H, M, D) and keys ``k`` (B, H, N, D) are of one dtype, on the CPU or CUDA; on CUDA in 16 bits, or
    32 where memory-efficient attention runs. Raises a `ValueError` if no fused attention of the device gives
    log-sum-exps.
    """
    q, k = q.contiguous(), k.contiguous()
    lse: Tensor
    if q.device.type in ("cpu", "meta"):
        lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, False, scale=scale)[1]
    elif q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, 0.0, False, False, scale=scale)[1]
    elif q.device.type == "cuda":
        lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, k, None, True, scale=scale)[1]
    else:
        raise ValueError(
            f"map_mode 'flash' needs fused attention that gives log-sum-exps, which torch has on the CPU and on CUDA, "
            f"not on {q.device.type}; use 'blocked', 'full' or 'sampled'"
        )
    return lse[..., : q.shape[2]].float()  # some kernels round the number of rows up


def column_sums(q: Tensor, k: Tensor, scale: float, lse: Tensor, s: Tensor) -> Tensor:
    """``sum_i A_ij s_i``: what each key is passed along the map, (B, H, N) float32.

    ``lse`` is `row_lse` of the queries and keys, ``s`` what each query has to pass on, (B, H, M) float32, positive.
    """
    bias = (s.log() - lse) / scale  # the product is multiplied by it
    largest = torch.finfo(q.dtype).max
    columns = []
    # Sixteen bits hold a logarithm to three digits only, and float16 no large one: the rest goes into further columns.
    for _ in range(COLUMNS):
        columns.append(bias.to(q.dtype).clamp(-largest, largest))
        bias = bias - columns[-1].float()
    biased = torch.cat([q, torch.stack(columns, -1)], -1)
    return row_lse(functional.pad(k, (0, COLUMNS), value=1.0), biased, scale).exp()
