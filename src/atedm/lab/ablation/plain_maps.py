"""What `triton_maps` beside this computes, by plain products that hold the whole map: to check kernels and to count."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.method.matching import attention_source


def row_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """As `atedm.lab.ablation.flash_maps.row_lse`, in float64 if that is what it is given."""
    return torch.logsumexp(_logits(q, k, scale), -1)


def column_sums(q: Tensor, k: Tensor, scale: float, lse: Tensor, s: Tensor) -> Tensor:
    """As `atedm.lab.ablation.flash_maps.column_sums`."""
    a = torch.exp(_logits(q, k, scale) - lse.unsqueeze(-1))
    return (s.unsqueeze(-2) @ a).squeeze(-2)


def copy_source(q: Tensor, k: Tensor, scale: float, lse: Tensor, keep: Tensor) -> Tensor:
    """As `atedm.lab.ablation.triton_maps.copy_source`."""
    rows = keep.unsqueeze(1).expand(-1, q.shape[1], -1)
    kept_queries = q.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, q.shape[3]))
    a = torch.exp(_logits(kept_queries, k, scale) - lse.gather(2, rows).unsqueeze(-1))
    whole = a.new_zeros(keep.shape[0], k.shape[2], k.shape[2])
    return attention_source(whole.scatter(1, keep.unsqueeze(-1).expand(-1, -1, k.shape[2]), a.mean(1)), keep)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scale * (q.to(exact) @ k.to(exact).mT)
