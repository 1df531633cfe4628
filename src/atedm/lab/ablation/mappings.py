"""The mappings f(A, s_K) that take G-WPR to cross-attention (supplement C.2).

Each takes the attention map A, (..., M, N), and the importance of the keys s_K, (..., N), and returns that of the
queries, (..., M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from atedm.method.gwpr import Mapping

_TINY = 1e-20  # far below any importance that matters, far above where 1 / x overflows float32
_MAX_EXPONENT = 60.0  # e^60 times M N of them is still a float32


def entropy(attention_map: Tensor, s_k: Tensor, floor: float = 1e-6) -> Tensor:
    """``s_q(i) = sum_j A_ij s_k(j) / (-sum_j A_ij ln A_ij)``: attend to what matters, and to few.

    Supplement C.2 says that it rewards by the dot product and penalises by the entropy; the quotient is our reading.
    ``floor`` is the least entropy to divide by; a one-hot row has none.
    """
    reward = torch.einsum("...mn,...n->...m", attention_map, s_k)
    # 0 ln 0 = 0, and its gradient is finite.
    row_entropy = -torch.einsum("...mn,...mn->...m", attention_map, attention_map.clamp_min(_TINY).log())
    return reward / row_entropy.clamp_min(floor)


def hard_clip(attention_map: Tensor, s_k: Tensor, eta: float = 0.2) -> Tensor:
    """``s_q(i) = sum_j [A_ij >= eta] s_k(j)`` (supplement Eq. 2)."""
    return torch.einsum("...mn,...n->...m", (attention_map >= eta).to(s_k.dtype), s_k)


def soft_clip(attention_map: Tensor, s_k: Tensor, eta: float = 0.2) -> Tensor:
    """``s_q(i) = sum_j sigmoid(A_ij - eta) s_k(j)`` (supplement Eq. 3)."""
    return torch.einsum("...mn,...n->...m", torch.sigmoid(attention_map - eta), s_k)


def power(attention_map: Tensor, s_k: Tensor, alpha: float = 5.0, beta: float | None = None) -> Tensor:
    """``s_q(i) = sum_j (beta s_k(j)) ^ (alpha A_ij)`` (supplement Eq. 4); ``beta`` is by default the paper's N / 2.

    Computed as ``exp(alpha A_ij ln(beta s_k(j)))`` with the exponent capped at 60, so that no alpha overflows; the
    default alpha and beta stay below 60 up to 300 000 keys. ``s_k(j) = 0`` counts as the least positive number, which
    gives 1 where ``A_ij = 0`` too.
    """
    beta = s_k.shape[-1] / 2 if beta is None else beta
    log_base = torch.log(beta * s_k.clamp_min(torch.finfo(s_k.dtype).tiny))
    exponent = attention_map * (alpha * log_base).unsqueeze(-2)
    return exponent.clamp_max_(_MAX_EXPONENT).exp_().sum(-1)  # in place: this M x N temporary is the only one


#: The mappings by name.
MAPPINGS: dict[str, Mapping] = {"entropy": entropy, "hard-clip": hard_clip, "soft-clip": soft_clip, "power": power}
