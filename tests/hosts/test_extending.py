"""Functions from outside of the package: given what is promised, used everywhere, refused clearly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import atedm
from atedm import AtEdm, Place, ToRefill, View
from atedm.lab.ablation import variant_of
from atedm.lab.ablation.recoveries import zero_padding
from atedm.lab.methods.by_name import imported
from atedm.method.keep import gather_tokens
from atedm.method.recovery import direct_copy
from models import EARLY, LATE, run, sdxl_unet, snapshot


def received(view: View) -> Tensor:
    q, k, scale = view.self_attention()
    return torch.softmax(scale * q.float() @ k.float().mT, -1).mean((1, 2))


def as_direct_copy(given: ToRefill) -> Tensor:
    return direct_copy(given.kept, given.keep, given.before)


class Never:
    """A schedule of one's own: no step is early."""

    def is_early(self, share: float) -> bool:
        return False

    def spares(self, place: Place) -> bool:
        return True


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (AtEdm(rank=received), replace(variant_of(AtEdm()), rank="attention-received")),
        (AtEdm(refill=as_direct_copy), replace(variant_of(AtEdm()), refill="direct-copy")),
        (AtEdm(spare=Never()), AtEdm(spare=None)),  # type: ignore[arg-type]
    ],
    ids=["rank", "refill", "spare"],
)
@pytest.mark.parametrize("timestep", [EARLY, LATE], ids=["early", "late"])
def test_a_function_that_does_what_a_name_does_gives_the_same(own: AtEdm, named: Any, timestep: int) -> None:
    unet = sdxl_unet()
    before = snapshot(unet)
    with atedm.pruned(unet, named):
        expected = run(unet, timestep)
    with atedm.pruned(unet, own):
        torch.testing.assert_close(run(unet, timestep), expected, rtol=1e-4, atol=1e-5)
    assert snapshot(unet) == before


def test_functions_are_given_what_is_promised() -> None:
    unet = sdxl_unet()
    seen: list[Any] = []

    def rank(view: View) -> Tensor:
        batch, tokens, width = view.tokens.shape
        q, k, scale = view.self_attention()
        words = view.cross_attention()
        assert q.shape == k.shape == (batch, q.shape[1], tokens, width // q.shape[1])
        assert words.q.shape == q.shape
        assert words.k.shape[2] == 7
        assert scale == pytest.approx(q.shape[3] ** -0.5)
        assert view.size[0] * view.size[1] == tokens
        assert view.count == round(0.5 * tokens)
        seen.append(int(view.step))
        return -torch.arange(tokens, device=q.device, dtype=torch.float32).expand(batch, -1)

    def refill(given: ToRefill) -> Tensor:
        batch, kept = given.keep.shape
        assert torch.equal(given.keep, torch.arange(kept).expand(batch, -1))  # as the ranking above says
        assert gather_tokens(given.before, given.keep).shape == given.kept.shape
        seen.append("refilled")
        return zero_padding(given.kept, given.keep, given.before.shape[1])

    steps = torch.arange(9, -1, -1)
    with atedm.pruned(unet, AtEdm(0.5, rank=rank, refill=refill, spare=None)) as summary:
        run(unet, steps[4])
    assert seen == len(summary.pruned) * [4, "refilled"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rank": lambda view: view.tokens}, r"rank .*lambda.* a tensor of \(2, \d+\), not \(2, \d+, \d+\)"),
        ({"rank": lambda view: None}, "not NoneType"),
        ({"refill": lambda given: given.kept}, r"refill .* must give a tensor of \(2, \d+, \d+\)"),
    ],
    ids=["rank", "nothing", "refill"],
)
def test_a_wrong_shape_is_named_and_the_model_left_clean(own: dict[str, Any], message: str) -> None:
    unet = sdxl_unet()
    before = snapshot(unet)
    with pytest.raises(ValueError, match=message), atedm.pruned(unet, AtEdm(**own)):
        run(unet)
    assert snapshot(unet) == before


@pytest.mark.parametrize("field", ["rank", "refill", "where"])
def test_names_are_no_functions(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, not 'mine:contrast'"):
        AtEdm(**{field: "mine:contrast"})


def test_a_schedule_of_one_s_own_is_paid_for() -> None:
    class MiddleThird(Never):
        def is_early(self, share: float) -> bool:
            return 0.4 < share < 0.6

    figures = atedm.cost("tiny", AtEdm(spare=MiddleThird())).figures()  # type: ignore[arg-type]
    assert figures.normal_step < figures.mean < figures.early_step


@pytest.mark.parametrize("wrong", ["torch:nothing", "nowhere:contrast", "torch"])
def test_what_cannot_be_imported_is_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        imported(wrong)
