"""The paper's baselines of similarity-based copy, against loops in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import references
from atedm.lab.ablation.recoveries import bicubic_interpolation, zero_padding
from atedm.method.keep import gather_tokens

SIZES = [(1, 1), (4, 4), (3, 5), (5, 2), (1, 6), (7, 7)]  # h, w


def make(batch: int, tokens: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Indices of some tokens, and their values."""
    generator = torch.Generator().manual_seed(0)
    kept = max(1, tokens * 2 // 5)
    keep = torch.rand(batch, tokens, generator=generator).argsort(-1)[:, :kept].sort(-1).values
    return keep, torch.randn(batch, kept, channels, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6, 15])
def test_zeros_match_the_formula(tokens: int, dtype: torch.dtype) -> None:
    keep, kept_tokens = make(2, tokens)
    kept_tokens = kept_tokens.to(dtype)
    out = zero_padding(kept_tokens, keep, tokens)
    assert out.dtype == dtype
    assert torch.equal(out.double(), references.over_batch(references.zero_padding, kept_tokens, keep, tokens))


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_matches_the_formula(size: tuple[int, int]) -> None:
    keep, kept_tokens = make(2, size[0] * size[1])
    out = bicubic_interpolation(kept_tokens, keep, size)
    expected = references.over_batch(references.bicubic_interpolation, kept_tokens, keep, size)
    torch.testing.assert_close(out, expected, check_dtype=False, rtol=1e-4, atol=1e-5)
    assert torch.equal(gather_tokens(out, keep), kept_tokens)  # bit for bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bicubic_interpolates_half_precision_in_float32(dtype: torch.dtype) -> None:
    keep, kept_tokens = make(2, 35)
    out = bicubic_interpolation(kept_tokens.to(dtype), keep, (5, 7))
    assert out.dtype == dtype
    # Only the result is rounded.
    expected = bicubic_interpolation(kept_tokens.to(dtype).float(), keep, (5, 7)).to(dtype)
    assert torch.equal(out, expected)


def test_bicubic_fades_far_from_kept_tokens() -> None:
    # The paper's objection: a dropped token among dropped tokens gets almost nothing.
    size = (12, 12)
    out = bicubic_interpolation(torch.ones(1, 1, 1), torch.tensor([[0]]), size).view(size)
    assert out[1, 1].abs() > 0.1
    assert out[6:, 6:].abs().max() < 1e-6


@pytest.mark.parametrize(
    "recover",
    [lambda x, keep: zero_padding(x, keep, 12), lambda x, keep: bicubic_interpolation(x, keep, (3, 4))],
    ids=["zeros", "bicubic"],
)
def test_gradients_compiling_and_no_wait_for_the_device(recover: Callable[[Tensor, Tensor], Tensor]) -> None:
    keep, kept_tokens = make(2, 12, channels=2)
    kept_tokens = kept_tokens.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: recover(x, keep), (kept_tokens,))
    (gradient,) = torch.autograd.grad(recover(kept_tokens, keep).sum(), kept_tokens)
    assert (gradient != 0).all()
    torch._dynamo.reset()
    compiled = torch.compile(recover, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(kept_tokens, keep), recover(kept_tokens, keep))
    assert recover(kept_tokens.to("meta"), keep.to("meta")).shape == (2, 12, 2)
