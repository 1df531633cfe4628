"""Every family of transformers: what is pruned is what it should be, and what is not stays bit for bit."""

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import atedm
from atedm import AtEdm, Matched, View
from atedm.hosts.diffusers_dit import find_transformer_spans
from atedm.hosts.dit_families import FAMILIES, Grid
from atedm.hosts.models import attach, detach
from atedm.method.contract import Cut
from atedm.method.keep import gather_tokens
from transformers_of import CONFIGS, call_of, image_of, transformer

FAMILY = pytest.mark.parametrize("name", CONFIGS)
METHODS = {"matched": Matched(rate=0.5), "at-edm": AtEdm(rate=0.5)}


@FAMILY
@torch.no_grad()
def test_rate_0_and_remove_are_dense_bit_for_bit(name: str) -> None:
    model, call = transformer(name), call_of(name)
    dense = image_of(model(**call))
    classes = [type(module) for module in model.modules()]
    for method in (Matched(rate=0.0), AtEdm(rate=0.0)):
        with atedm.pruned(model, method):
            assert torch.equal(image_of(model(**call)), dense)
    with atedm.pruned(model, Matched(rate=0.5)):
        assert not torch.equal(image_of(model(**call)), dense)
    assert torch.equal(image_of(model(**call)), dense)
    assert [type(module) for module in model.modules()] == classes
    assert not any("_atedm" in vars(module) for module in model.modules())


@FAMILY
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_a_second_call_and_a_copy_give_the_same(name: str, method: Any) -> None:
    model, call = transformer(name), call_of(name)
    atedm.apply(model, method)
    once = image_of(model(**call))
    assert once.isfinite().all()
    assert torch.equal(image_of(model(**call)), once)
    assert torch.equal(image_of(copy.deepcopy(model)(**call)), once)
    unpickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(image_of(unpickled(**call)), once)
    atedm.remove(unpickled)
    atedm.remove(model)
    assert torch.equal(image_of(unpickled(**call)), image_of(model(**call)))


@dataclass(frozen=True, eq=False)
class Chosen:
    """A method of one's own that keeps given tokens, each standing for some, and refills with zeros."""

    keep: Tensor
    weights: Tensor
    rate: float = 0.5
    seen: list[View] = field(default_factory=list)

    name, dense_layers, remembers = "chosen", 0, False

    def is_early(self, share: float) -> bool:
        return False

    def count(self, place: Any, tokens: int, *, early: bool = False) -> int:
        return self.keep.shape[1]

    def drop(self, view: View) -> Cut:
        self.seen.append(view)

        def refill(kept: Tensor) -> Tensor:
            return torch.zeros_like(view.tokens).scatter(1, self.keep.unsqueeze(-1).expand_as(kept), kept)

        tokens = gather_tokens(view.tokens, self.keep)
        return Cut(tokens, self.keep, torch.zeros(view.tokens.shape[:2]), refill, weights=self.weights)

    def as_dict(self) -> dict[str, Any]:
        return {}


class Masked(TorchFunctionMode):
    """Adds a bias over the image's keys to attentions of a known length, and changes nothing else."""

    def __init__(self, lengths: dict[int, int], bias: Tensor) -> None:
        super().__init__()
        self.lengths, self.bias = lengths, bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        if func is nn.functional.scaled_dot_product_attention and given["key"].shape[-2] in self.lengths:
            length = given["key"].shape[-2]
            if given["query"].shape[-2] == length:
                start = self.lengths[length]
                bias = torch.zeros(len(self.bias), 1, 1, length)
                bias[..., start : start + self.bias.shape[1]] = self.bias[:, None, None]
                mask = given.get("attn_mask")
                if mask is not None and mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
                return func(**given | {"attn_mask": bias if mask is None else mask + bias})
        return func(*args, **(kwargs or {}))


@FAMILY
@torch.no_grad()
def test_kept_tokens_are_those_of_a_dense_run_in_which_the_dropped_ones_are_masked(name: str) -> None:
    # A block works on each token alone but for its attention. So dropping tokens must be what masking their keys is,
    # and a token that stands for n must be what a bias of log n is: if tables of positions, masks and counts go along.
    model, call = transformer(name), call_of(name)
    batch, tokens = 2, 64
    kind = next(iter(FAMILIES[name].kinds.values()))
    torch.manual_seed(1)
    keep = torch.stack([torch.randperm(tokens)[:40].sort().values for _ in range(batch)])
    if kind.one_set:
        keep = keep[:1].expand(batch, -1)
    weights = torch.rand(batch, 40) * 3 + 1
    spans = find_transformer_spans(model)
    _, blocks = next(iter(spans.values()))
    method = Chosen(keep, weights)
    seen: list[Any] = []
    hook = blocks[-1].register_forward_hook(lambda *given: seen.append(given[-1]))
    lengths_seen: list[int] = []
    text = _text_tokens(name, model, call, lengths_seen)
    order = kind.attends[0]
    lengths = {tokens + text: text if order.startswith("text") else 0}
    if "image" in kind.attends:
        lengths[tokens] = 0
    bias = torch.full((batch, tokens), float("-inf")).scatter(1, keep, weights.log())
    active = _ActiveIn(blocks, Masked(lengths, bias))
    model(**call)
    active.stop()
    masked = seen.pop()
    attach(model, method)  # not by apply, which would count what the method adds
    model(**call)
    detach(model)
    hook.remove()
    assert len(method.seen) == len(spans)
    assert method.seen[0].size == (8, 8)
    for view in method.seen:
        assert view.tokens.shape[:2] == (batch, tokens)
    pruned = seen.pop()

    def image(returned: Any) -> Tensor:
        hidden = returned if kind.returns is None else returned[kind.returns]
        start = text if kind.joined and order.startswith("text") else 0
        return gather_tokens(hidden[:, start : start + tokens], keep)

    torch.testing.assert_close(image(pruned), image(masked), rtol=1e-4, atol=1e-4)
    if isinstance(masked, tuple):
        torch.testing.assert_close(pruned[1 - kind.returns], masked[1 - kind.returns], rtol=1e-4, atol=1e-4)


def _text_tokens(name: str, model: Any, call: dict[str, Any], lengths: list[int]) -> int:
    """How many tokens the first attention of the first span has besides the image's."""

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                lengths.append(int((kwargs or {}).get("key", args[1] if len(args) > 1 else None).shape[-2]))
            return func(*args, **(kwargs or {}))

    _, blocks = next(iter(find_transformer_spans(model).values()))
    active = _ActiveIn(blocks[:1], Watch())
    model(**call)
    active.stop()
    return lengths[0] - 64


class _ActiveIn:
    """Enters a mode while any of the blocks runs."""

    def __init__(self, blocks: list[nn.Module], mode: TorchFunctionMode) -> None:
        self.hooks = [block.register_forward_pre_hook(lambda *_: mode.__enter__() and None) for block in blocks]
        self.hooks += [block.register_forward_hook(lambda *_: mode.__exit__(None, None, None)) for block in blocks]

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()


@FAMILY
@torch.no_grad()
def test_other_sizes_and_batches_in_turn(name: str) -> None:
    model = transformer(name)
    calls = [call_of(name, size=(6, 10)), call_of(name), call_of(name, batch=1, size=(6, 10))]
    atedm.apply(model, Matched(rate=0.5))
    alone = [image_of(copy.deepcopy(model)(**call)) for call in calls]
    for call, expected in zip([*calls, *calls], [*alone, *alone], strict=True):
        assert torch.equal(image_of(model(**call)), expected)


@torch.no_grad()
def test_pictures_to_go_by_are_pruned_with_the_one_that_is_made() -> None:
    # Qwen-Image-Edit: tokens of two pictures in one sequence, each with a modulation of its own.
    model = transformer("QwenImageTransformer2DModel", zero_cond_t=True)
    call = call_of("QwenImageTransformer2DModel", size=(8, 12))
    call["img_shapes"] = [[(1, 8, 8), (1, 4, 8)]] * 2
    attach(model, Matched(rate=0.5))
    pruned = image_of(model(**call))
    assert pruned.isfinite().all()
    call["hidden_states"] = call["hidden_states"].flip(0)
    call["encoder_hidden_states"] = call["encoder_hidden_states"].flip(0)
    call["encoder_hidden_states_mask"] = call["encoder_hidden_states_mask"].flip(0)
    torch.testing.assert_close(image_of(model(**call)), pruned.flip(0), rtol=1e-4, atol=1e-4)
    detach(model)
    attach(model, Matched(rate=0.5), torch.ones(8, 8))
    with pytest.raises(ValueError, match="protect"):
        model(**call)


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        ([(1, 6, 10)], Grid((6, 10))),
        ([(1, 6, 10), (1, 4, 10)], Grid((10, 10), is_picture=False)),  # below one another
        ([(1, 6, 10), (1, 4, 10), (1, 2, 10)], Grid((12, 10), is_picture=False)),
        ([(1, 6, 10), (1, 4, 8)], Grid((1, 92), is_picture=False)),  # of two widths: in a row
        ([(2, 3, 10)], Grid((6, 10), is_picture=False)),
    ],
)
def test_pictures_of_one_width_make_one_grid(pictures: list[tuple[int, int, int]], expected: Grid) -> None:
    tokens = sum(frames * height * width for frames, height, width in pictures)
    hidden = torch.zeros(1, tokens, 4)
    given = {"hidden_states": hidden, "img_shapes": [pictures]}
    assert FAMILIES["QwenImageTransformer2DModel"].grid(None, given) == expected
    if pictures[0][0] > 1:
        return  # FLUX makes no videos
    rows = [
        (index, y, x) for index, (_, height, width) in enumerate(pictures) for y in range(height) for x in range(width)
    ]
    given = {"hidden_states": hidden, "img_ids": torch.tensor(rows)}
    assert FAMILIES["FluxTransformer2DModel"].grid(None, given) == expected


def test_return_positions_are_those_diffusers_has() -> None:
    helpers = pytest.importorskip("diffusers.hooks._helpers")
    for name, family in FAMILIES.items():
        model = transformer(name)
        for blocks, kind in family.kinds.items():
            try:
                known = helpers.TransformerBlockRegistry.get(type(model.get_submodule(blocks)[0]))
            except ValueError:
                continue  # a class it does not have
            returns = known.return_hidden_states_index
            both = known.return_encoder_hidden_states_index is not None
            assert kind.returns == (returns if both else None), name
