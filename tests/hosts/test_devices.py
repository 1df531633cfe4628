"""What runs otherwise on a GPU: run on a GPU where there is one, else on the CPU, and traced without data anywhere.

Correct results on one device are the claim here, not speed: `benchmarks/cuda.py` has that.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import atedm
from atedm.app.devices import check_device, processor_of
from atedm.lab.bench.peak import peak_of
from atedm.lab.timing import Stopwatch
from atedm.method import matching
from atedm.method.keep import gather_tokens, keep_most_important
from atedm.method.matching import Match, match_by_features
from atedm.method.presets import METHODS
from atedm.method.recovery import group_sizes, mean_by_source
from models import LATE, distance, run, sdxl_unet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokens_and_kept(dtype: torch.dtype, batch: int = 2, tokens: int = 300, kept: int = 111) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(batch, tokens, 40, generator=generator).to(DEVICE, dtype)
    order = torch.rand(batch, tokens, generator=generator).argsort(-1)
    return features, order[:, :kept].sort(-1).values.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("entries", [2**8, 2**26])
@pytest.mark.parametrize("way", [match_by_features, matching._match_every_token])
def test_the_nearest_token_is_found_by_every_product(
    way: Callable[[Tensor, Tensor], Match], dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU is right on a CPU, too."""
    monkeypatch.setattr(matching, "_CHUNK", entries)
    monkeypatch.setattr(matching, "_CHUNK_ON_GPU", entries)
    features, keep = tokens_and_kept(dtype)
    match = way(features, keep)
    exact = features.double().cpu()
    distances = torch.cdist(exact, gather_tokens(exact, keep.cpu())).square()
    found = distances.gather(2, match.source.cpu().unsqueeze(-1)).squeeze(-1)
    # In bfloat16 the CPU finds the nearest but for a hundredth; every other way is exact but for float32 sums.
    in_16_bits = way is match_by_features and DEVICE == "cpu" and dtype == torch.bfloat16
    slack = 2e-2 if in_16_bits else 1e-4
    assert (found <= distances.amin(-1) * (1 + slack) + 1e-6).all()
    dropped = torch.ones(found.shape, dtype=torch.bool).scatter(1, keep.cpu(), False)
    torch.testing.assert_close(-match.similarity.cpu().double()[dropped], found[dropped], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_are_right_and_the_same_every_time(dtype: torch.dtype) -> None:
    features, keep = tokens_and_kept(dtype, tokens=2000, kept=7)
    source = match_by_features(features, keep).source
    sizes = group_sizes(source, 7)
    means = [mean_by_source(features, source, sizes) for _ in range(5)]
    assert all(torch.equal(mean, means[0]) for mean in means)
    groups = torch.nn.functional.one_hot(source.cpu(), 7).double().mT
    expected = groups @ features.double().cpu() / groups.sum(-1, keepdim=True)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(means[0].double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_of_equally_important_tokens_the_first_stay() -> None:
    importance = torch.zeros(3, 4096, device=DEVICE)
    importance[:, 4000] = 1
    keep = keep_most_important(importance, 100)
    assert torch.equal(keep.cpu(), torch.tensor([*range(99), 4000]).expand(3, -1))


@pytest.mark.parametrize("name", [*METHODS])
def test_a_pruned_unet_gives_the_same_every_time_and_what_the_cpu_gives(name: str) -> None:
    unet = sdxl_unet()
    with atedm.pruned(unet, name):
        expected = run(unet)
    unet.to(DEVICE)

    def seen() -> Tensor:
        with atedm.pruned(unet, name):
            return run(unet, LATE).cpu()

    first = seen()
    assert torch.equal(seen(), first)
    # Another device rounds otherwise, and now and then another token is the most important by a hair.
    assert distance(first, expected) < 0.1


def test_peak_laps_and_names_of_the_device() -> None:
    check_device(DEVICE)
    assert processor_of(DEVICE)
    x = torch.zeros(250_000, device=DEVICE)
    peak = peak_of(lambda: (x + 1).mul(2), torch.device(DEVICE))
    assert peak is not None
    assert 2_000_000 <= peak < 3_000_000
    watch = Stopwatch(torch.device(DEVICE))
    (x @ x).exp()
    watch.lap("product")
    assert watch.read()["product"] > 0


class Launches(TorchDispatchMode):
    """Notes operations that start a kernel: not views, nor empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and "empty" not in func._schema.name:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_cuda_a_match_is_one_product_and_few_launches(dtype: torch.dtype) -> None:
    """At SDXL's size, on tensors without data, which need no GPU."""
    with FakeTensorMode(), Launches() as launches:
        features = torch.empty(2, 4096, 640, device="cuda", dtype=dtype)
        keep = torch.empty(2, 1516, device="cuda", dtype=torch.long)
        match = match_by_features(features, keep)
        assert match.source.shape == match.similarity.shape == (2, 4096)
        assert match.similarity.dtype == torch.float32
        matched = [*launches.names]
        mean_by_source(features, match.source, group_sizes(match.source, 1516))
    assert matched.count("bmm") == 1
    assert len(matched) <= 18, matched
    assert "index_put" in launches.names  # which sorts; index_add would not give the same image twice
