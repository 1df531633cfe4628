"""A fitted refill brings images nearer to dense, goes on where it was stopped, and leaves no trace."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import atedm
from atedm import Matched
from atedm.app.models import load_pipeline
from atedm.hosts.models import find_model, spans_of
from atedm.lab.methods.candidates import Dense, Planned
from atedm.lab.methods.counting import counted_run
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Cache, Plan, read_plan
from atedm.tuning.dense_spans import run_dense
from atedm.tuning.fit import Fitted, fit
from atedm.tuning.prompts import tuning_prompts
from models import sdxl_pipeline, snapshot
from transformers_of import call_of, transformer

METHOD = Matched(rate=0.95, level_factors=(), own_update_share=1.0, dense_share=0.3)
SIZE = (128, 128)
CALL = {"prompt": "a duck", "guidance_scale": 0.0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny-sd3-turbo", device="cpu")


@pytest.fixture(scope="module")
def plan(pipe: Any) -> Plan:
    return Plan(fingerprint(pipe), 4, method=METHOD, guidance=0.0)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return tuning_prompts("tiny-sd3-turbo", 16)


@pytest.fixture(scope="module")
def fitted(pipe: Any, plan: Plan, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(pipe, plan, prompts, tmp_path_factory.mktemp("fitted"))


def image(pipe: Any, seed: int = 99) -> Tensor:
    noise = torch.Generator("cpu").manual_seed(seed)
    asked = {"num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "pt"}
    found: Tensor = pipe(tuning_prompts("tiny-sd3-turbo", 24)[20:], generator=noise, **asked).images
    return found


def test_images_come_nearer_to_dense_also_of_a_prompt_it_did_not_see(pipe: Any, plan: Plan, fitted: Fitted) -> None:
    assert fitted.steps[0] == 2  # the first two steps are dense
    unfitted = counted_run(pipe, Planned(plan), CALL, 4) / counted_run(pipe, Dense(), CALL, 4)
    assert unfitted < fitted.plan.found["cost"] < unfitted + 0.02
    assert fitted.distances[fitted.steps[-1]] > fitted.before + 2
    dense, errors = image(pipe), []
    for applied in (plan, fitted.file):
        with atedm.pruned(pipe, applied):
            errors.append((image(pipe) - dense).square().mean())
    assert errors[1] < 0.7 * errors[0]
    assert torch.equal(image(pipe), dense)


def test_a_fit_that_was_stopped_goes_on_to_the_same_matrices(
    pipe: Any, plan: Plan, prompts: list[str], fitted: Fitted, tmp_path: Path
) -> None:
    before = snapshot(pipe.transformer)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("fitting step 4", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(pipe, plan, prompts, tmp_path, progress=stop)
    assert snapshot(pipe.transformer) == before
    again = fit(pipe, plan, prompts, tmp_path)
    assert fit(pipe, plan, prompts, tmp_path).distances == again.distances  # nothing is left to do
    assert (again.distances, again.steps) == (fitted.distances, fitted.steps)
    ours, whole = (load_file(file.parent / "fit.safetensors") for file in (again.file, fitted.file))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="holds a fit of another seed"):
        fit(pipe, plan, prompts, tmp_path, seed=1)


def test_the_file_of_another_model_of_other_weights_or_none_is_refused(
    pipe: Any, fitted: Fitted, tmp_path: Path
) -> None:
    found = read_plan(fitted.file)
    before = snapshot(pipe.transformer)
    with pytest.raises(FileNotFoundError, match="the fitted refill of this plan is not at"):
        atedm.apply(pipe, dataclasses.replace(found, folder=tmp_path))
    (tmp_path / "fit.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no fitted refill"):
        atedm.apply(pipe, dataclasses.replace(found, folder=tmp_path))
    save_file({"another": torch.zeros(2, 8, 2)}, tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="fitted on another model: this one has no another"):
        atedm.apply(pipe, dataclasses.replace(found, folder=tmp_path))
    with pytest.raises(ValueError, match="fitted refill of this plan was found for other weights"):
        atedm.apply(pipe, dataclasses.replace(found, found={**found.found, "weights": 1}))
    assert snapshot(pipe.transformer) == before
    assert not atedm.is_applied(pipe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": None}, "prunes nothing"),
        ({"method": atedm.AtEdm()}, "only matched pruning has a refill that can be fitted, not AT-EDM"),
        ({"method": Matched(own_update_share=0.0)}, "own_update_share=0 remembers none"),
        ({"folder": Path("out")}, "is the folder of the plan"),
        ({"cache": Cache(2, 1.0, None)}, "this plan has a cache"),
        ({"fit": "fit.safetensors"}, "this plan has a fit"),
        ({"model": {"num_layers": 9}}, "for another model"),
    ],
)
def test_a_plan_that_cannot_be_fitted_is_refused(
    pipe: Any, plan: Plan, prompts: list[str], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    if "model" in change:
        change = {"model": {**plan.model, **change["model"]}}
    if "folder" in change:
        change = {"folder": tmp_path}
    with pytest.raises(ValueError, match=said):
        fit(pipe, dataclasses.replace(plan, **change), prompts, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_too_few_prompts_and_a_patched_pipeline_are_refused(
    pipe: Any, plan: Plan, prompts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="8 prompts or more"):
        fit(pipe, plan, prompts[:3], tmp_path)
    with pytest.raises(TypeError, match="give the whole pipeline"):
        fit(pipe.transformer, plan, prompts, tmp_path)
    with atedm.pruned(pipe), pytest.raises(ValueError, match="this pipeline is patched"):
        fit(pipe, plan, prompts, tmp_path)


def test_a_unet_with_guidance_is_fitted_in_its_first_step_too(tmp_path: Path) -> None:
    pipe = sdxl_pipeline()
    plan = Plan(fingerprint(pipe), 3, method=Matched(rate=0.8), guidance=3.0, size=SIZE)
    found = fit(pipe, plan, ["a duck", "a castle", "a rose", "a boat"] * 2, tmp_path)
    assert [*found.distances][:2] == [0, 1]
    assert not atedm.is_applied(pipe)
    asked = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": 128, "height": 128, "output_type": "pt"}

    def drawn() -> Tensor:
        image: Tensor = pipe("a duck", generator=torch.Generator().manual_seed(5), **asked).images
        return image

    name, width = "down_blocks.1.attentions.0", spans_of(pipe.unet)["down_blocks.1.attentions.0"][1].inner_dim
    save_file({name: 0.1 * torch.randn(1, 4 * width, width)}, tmp_path / "hand.safetensors")
    with atedm.pruned(pipe, plan):
        plain = drawn()
    with atedm.pruned(pipe, dataclasses.replace(plan, fit="hand.safetensors", folder=tmp_path)):
        assert not torch.equal(drawn(), plain)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
@torch.no_grad()
def test_a_dense_run_tells_what_each_span_of_a_transformer_adds(name: str) -> None:
    model, call = transformer(name), call_of(name)
    starts: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}
    for span, (_, blocks) in spans_of(model).items():
        blocks[0].register_forward_pre_hook(
            lambda _, a, k, span=span: starts.__setitem__(span, k.get("hidden_states", a[0] if a else None)),
            with_kwargs=True,
        )
        blocks[-1].register_forward_hook(lambda _, __, output, span=span: ends.__setitem__(span, output[1]))
    added = run_dense(model, Matched(rate=0.5), (), call)
    assert added.keys() == spans_of(model).keys()
    for span, update in added.items():
        assert torch.equal(update, ends[span] - starts[span])
    assert not hasattr(model, "_atedm")


@torch.no_grad()
def test_a_dense_run_tells_what_each_span_of_a_unet_adds() -> None:
    pipe = sdxl_pipeline()
    unet, calls = find_model(pipe), []
    hook = unet.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    pipe("a duck", num_inference_steps=1, width=128, height=128, output_type="latent")
    hook.remove()
    layers = {span: block.transformer_blocks for span, (_, block) in spans_of(unet).items()}
    starts: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}
    hooks = []
    for span, blocks in layers.items():
        hooks.append(blocks[0].register_forward_pre_hook(lambda _, a, span=span: starts.__setitem__(span, a[0])))
        hooks.append(blocks[-1].register_forward_hook(lambda _, __, out, span=span: ends.__setitem__(span, out)))
    added = run_dense(unet, Matched(), *calls[0])
    for hook in hooks:
        hook.remove()
    assert added.keys() == layers.keys()
    for span, update in added.items():
        assert torch.equal(update, ends[span] - starts[span])
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in layers[span])
