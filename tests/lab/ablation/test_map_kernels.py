"""Sums and largest entries of maps that are never made: stock flash attention, and Triton kernels in its interpreter.

References are taken in float64 of the very inputs, whatever their dtype. Products of 16-bit numbers are exact in
float32, so what is left is float32 sums: a relative error of a few 1e-6 in the kernels, and of 1e-4 in stock flash
attention, which rounds the weights within its sums to 16 bits.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atedm.lab.ablation import flash_maps, plain_maps
from atedm.lab.ablation.map_modes import scores_by_flash, scores_by_triton
from atedm.method.gwpr import rank_by_attention
from atedm.method.keep import keep_most_important
from atedm.method.map_scores import Scores, scores_in_blocks
from atedm.method.matching import attention_source

triton = pytest.importorskip("triton")
triton_maps = pytest.importorskip("atedm.lab.ablation.triton_maps")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {triton_maps: 2e-5, flash_maps: 3e-4}


COMPILE = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("triton_maps", sys.argv[1])
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
pointers = {"lse": "*fp32", "s": "*fp32", "keep": "*i64", "scale": "fp32"}
for dtype, bytes_each, precision, width in (("bf16", 2, "tf32", 64), ("fp32", 4, "ieee", 160)):
    tile = t.tile_of(width, bytes_each)
    constants = {"WIDTH": t.width_of(width), "ROWS": tile, "COLUMNS": tile, "PRECISION": precision}
    for kernel in (t._row_lse, t._column_sums, t._copy_source):
        types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
        types |= {"q": "*" + dtype, "k": "*" + dtype, "out": "*i64" if kernel is t._copy_source else "*fp32"}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        print(triton.compile(source, target=GPUTarget("cuda", 80, 32)).metadata.shared)
"""


@pytest.fixture(scope="module", autouse=True)
def compiling() -> Iterator[subprocess.Popen[str]]:
    """Compile for a GPU while the other tests run: in a process without the interpreter, as the two do not mix."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, triton_maps.__file__]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.kill()


def compared(batch: int, heads: int, rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys as a projection leaves them, heads beside each other."""
    generator = torch.Generator().manual_seed(rows + width)
    q, k = (
        (2 * torch.randn(batch, n, heads, width, generator=generator)).to(dtype).transpose(1, 2).to(DEVICE)
        for n in (rows, columns)
    )
    return q, k


@pytest.mark.parametrize("maps", [triton_maps, flash_maps], ids=["triton", "flash"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 8), (2, 3, 35, 35, 40), (1, 2, 130, 130, 64), (1, 1, 65, 7, 80), (2, 1, 3, 70, 160)]
)
def test_sums_over_the_map_are_those_of_the_map(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, maps: ModuleType
) -> None:
    q, k = compared(*shape, dtype)
    lse = maps.row_lse(q, k, 0.2)
    expected = plain_maps.row_lse(q.double(), k.double(), 0.2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=TOLERANCE[maps])
    s = torch.rand(q.shape[:3], generator=torch.Generator().manual_seed(0)).to(DEVICE) ** 4 + 1e-20
    sums = maps.column_sums(q, k, 0.2, lse, s)
    a = torch.softmax(0.2 * q.double() @ k.double().mT, -1)
    torch.testing.assert_close(
        sums.double(), torch.einsum("bhmn,bhm->bhn", a, s.double()), rtol=TOLERANCE[maps], atol=0
    )


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 140),
    heads=st.integers(1, 3),
    batch=st.integers(1, 2),
    width=st.sampled_from([8, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    share=st.floats(0.01, 1),
)
def test_copies_are_those_of_the_mean_map(
    tokens: int, heads: int, batch: int, width: int, dtype: torch.dtype, share: float
) -> None:
    q, k = compared(batch, heads, tokens, tokens, width, dtype)
    count = max(1, round(share * tokens))
    generator = torch.Generator().manual_seed(tokens)
    keep = torch.stack([torch.randperm(tokens, generator=generator)[:count].sort().values for _ in range(batch)])
    keep = keep.to(DEVICE)
    source = triton_maps.copy_source(q, k, 0.2, triton_maps.row_lse(q, k, 0.2), keep)
    a = torch.softmax(0.2 * q.double() @ k.double().mT, -1).mean(1)
    best = attention_source(a, keep)
    kept = a.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens))
    ours, most = (kept.gather(1, where.unsqueeze(1)) for where in (source, best))
    torch.testing.assert_close(ours, most, rtol=2e-5, atol=0)  # another one only where there is nothing between them
    assert torch.equal(source.gather(1, keep), best.gather(1, keep))


def test_of_equal_entries_the_first_is_copied() -> None:
    q = k = torch.zeros(1, 2, 150, 16, device=DEVICE)
    keep = torch.arange(3, 150, 2, device=DEVICE).unsqueeze(0)
    source = triton_maps.copy_source(q, k, 1.0, triton_maps.row_lse(q, k, 1.0), keep)
    dropped = torch.ones(150, dtype=torch.bool, device=DEVICE).index_fill(0, keep[0], False)
    assert (source[0, dropped] == 0).all()


def test_logits_that_leave_the_range_of_half_precision_are_summed() -> None:
    q, k = compared(1, 1, 20, 20, 64, torch.float16)
    q, k = 30 * q, 30 * k  # products of up to a few hundred thousand
    lse = triton_maps.row_lse(q, k, 0.125)
    expected = plain_maps.row_lse(q.double(), k.double(), 0.125)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=0)
    assert expected.max() > 65504 / 8


@pytest.mark.parametrize("size", [1, 30, 60, 100])
def test_flash_ranks_by_logits_that_leave_the_range_of_half_precision(size: float) -> None:
    """Within what whole maps hold such logits at: the log-sum-exp rides in columns of 16 bits."""
    torch.manual_seed(0)
    q, k = ((size * torch.randn(1, 2, 40, 64)).half() for _ in "qk")
    expected, found = (
        by(q.float(), k.float(), 0.125, iterations=3).importance for by in (scores_in_blocks, scores_by_flash)
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)
    halves = scores_by_flash(q, k, 0.125, iterations=3).importance
    assert halves.isfinite().all()
    assert torch.equal(keep_most_important(halves, 15), keep_most_important(expected, 15))


@pytest.mark.parametrize("scores_by", [scores_by_triton, scores_by_flash], ids=["triton", "flash"])
def test_the_ranking_is_that_of_the_whole_map(scores_by: object) -> None:
    assert callable(scores_by)
    q, k = compared(2, 3, 70, 70, 40, torch.float32)
    whole = rank_by_attention(q, k, 0.2, iterations=4)
    scores: Scores = scores_by(q, k, 0.2, iterations=4)
    torch.testing.assert_close(scores.importance, whole.importance, rtol=1e-3, atol=1e-7)
    keep = keep_most_important(whole.importance, 26)
    assert torch.equal(scores.source(keep), attention_source(whole.attention_map, keep))


@pytest.mark.parametrize("scores_by", [scores_by_triton, scores_by_flash], ids=["triton", "flash"])
def test_a_flat_map_ranks_all_alike(scores_by: object) -> None:
    assert callable(scores_by)
    q = k = torch.zeros(3, 2, 49, 8, device=DEVICE)
    scores: Scores = scores_by(q, k, 0.3, iterations=3)
    torch.testing.assert_close(scores.importance, torch.full((3, 49), 1 / 49, device=DEVICE))


def test_without_cuda_it_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_maps, "_row_lse", object.__new__(triton.JITFunction))  # as it is where none interprets
    with pytest.raises(ValueError, match=r"^map_mode 'triton' runs on CUDA, not on cpu; use 'auto', which picks what"):
        triton_maps.row_lse(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 1.0)


def test_kernels_compile_for_a_gpu_and_fit_its_shared_memory(compiling: subprocess.Popen[str]) -> None:
    printed, error = compiling.communicate()
    assert compiling.returncode == 0, error
    assert max(int(line) for line in printed.split()) <= 99 * 1024  # of the smallest since Ampere, an RTX 3090
