"""A host for another family in sixty lines: what a method needs is in `View`, what it gives in `Cut`."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from atedm import AtEdm, Matched, Place, View
from atedm.method.contract import Memory, Method, QueriesAndKeys


class ToyLayer(nn.Module):
    """Self-attention and a feed-forward over (B, N, C); ``bias`` (B, 1, 1, N) is added to the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))  # one head

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).squeeze(1))
        return x + self.ff(x)  # type: ignore[no-any-return]


@dataclass
class ToyHost:
    """Prunes a stack of layers as one span."""

    layers: nn.ModuleList
    method: Method
    size: tuple[int, int]
    memory: Memory = field(default_factory=Memory)

    def __call__(self, x: Tensor, step: int, steps: int) -> Tensor:
        place = Place("mid", 1, 0, 1, len(self.layers), "toy")
        count = self.method.count(place, x.shape[1], early=self.method.is_early(step / steps))
        self.memory.begin_step(follows=step > 0)
        dense = self.method.dense_layers if count < x.shape[1] else len(self.layers)
        start = x
        for layer in self.layers[:dense]:
            x = layer(x)
        if dense == len(self.layers):
            return x
        attention = partial(self._attention, start)
        cut = self.method.drop(View(place, self.size, count, step, x, attention, attention, memory=self.memory))
        x = cut.tokens
        bias = None if cut.weights is None else cut.weights.log()[:, None, None]
        for layer in self.layers[dense:]:
            x = layer(x, bias)
        return cut.refill(x)

    def _attention(self, x: Tensor) -> QueriesAndKeys:
        q, k, _ = self.layers[0].queries_keys_values(x)
        return QueriesAndKeys(q, k, q.shape[-1] ** -0.5)


@pytest.fixture
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(ToyLayer(16) for _ in range(4))


METHODS = pytest.mark.parametrize("method", [AtEdm(spare=None), Matched()], ids=["AT-EDM", "matched"])


@METHODS
@torch.no_grad()
def test_both_methods_prune_it(layers: nn.ModuleList, method: Method) -> None:
    x = torch.randn(2, 48, 16)
    seen: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    out = ToyHost(layers, method, (6, 8))(x, 0, 10)
    kept = method.count(Place("mid", 1, 0, 1, 4, "toy"), 48)
    assert seen == [48] * method.dense_layers + [kept] * (4 - method.dense_layers)
    assert out.shape == x.shape
    assert out.isfinite().all()


@torch.no_grad()
def test_matched_pruning_of_copies_is_dense(layers: nn.ModuleList) -> None:
    x = torch.randn(1, 2, 16)[:, torch.arange(48) % 2]  # two tokens, over and over
    dense = x
    for layer in layers:
        dense = layer(dense)
    pruned = ToyHost(layers, Matched(rate=0.75), (6, 8))(x, 0, 10)
    torch.testing.assert_close(pruned, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_early_steps_and_rate_0_are_dense_and_memory_lives_for_one_step(layers: nn.ModuleList) -> None:
    x = torch.randn(1, 48, 16)
    dense = x
    for layer in layers:
        dense = layer(dense)
    assert torch.equal(ToyHost(layers, Matched(rate=0.0), (6, 8))(x, 0, 10), dense)
    host = ToyHost(layers, Matched(), (6, 8))
    first, second = host(x, 0, 10), host(x, 1, 10)
    assert torch.equal(ToyHost(layers, Matched(), (6, 8))(x, 0, 10), first)
    assert host.memory.last is not None
    assert not torch.equal(ToyHost(layers, Matched(), (6, 8))(x, 1, 10), second)  # without the step before
