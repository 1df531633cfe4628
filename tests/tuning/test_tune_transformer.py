"""Plans for transformers: forecast by the text of a call, searched like others, and gone afterwards."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

import atedm
from atedm import Matched
from atedm.app.models import load_pipeline
from atedm.costs.architectures import architecture
from atedm.lab.methods.candidates import Dense, Planned
from atedm.lab.methods.counting import counted_run
from atedm.method.presets import TRANSFORMER_METHODS
from atedm.plans.fingerprint import fingerprint
from atedm.plans.forecasting import forecast
from atedm.plans.plan import Cache, Plan
from atedm.tuning.costs import Arithmetic
from atedm.tuning.finetune import Training, finetune, targets
from atedm.tuning.memory import training_needs
from atedm.tuning.timing import Times
from models import snapshot
from transformers_of import call_of, image_of, small_sd3, transformer

MATCHED = TRANSFORMER_METHODS["matched"]
CALL: dict[str, Any] = {"prompt": "a duck", "width": 128, "height": 128, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_sd3()


@pytest.fixture(scope="module")
def plan(pipe: Any) -> Plan:
    return Plan(fingerprint(pipe), 6, None, MATCHED, Cache(4, 1.0, None), 1.0, (128, 128))


def latents(pipe: Any, steps: int = 6, **more: Any) -> torch.Tensor:
    noise = torch.Generator("cpu").manual_seed(1)
    found: torch.Tensor = pipe(**CALL | more, num_inference_steps=steps, generator=noise, output_type="latent").images
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_plan_costs_what_torch_counts_and_leaves_no_trace(pipe: Any, plan: Plan, guidance: float) -> None:
    dense = latents(pipe, guidance_scale=guidance)
    with atedm.pruned(pipe, plan) as summary:
        first, again = (latents(pipe, guidance_scale=guidance) for _ in range(2))
        assert "4 of them whole, the others forecast" in str(summary)
    assert torch.equal(first, again)
    assert not torch.equal(first, dense)
    assert torch.equal(latents(pipe, guidance_scale=guidance), dense)
    call = CALL | {"guidance_scale": guidance}
    counted = counted_run(pipe, Planned(plan), call, 6) / counted_run(pipe, Dense(), call, 6)
    arithmetic = Arithmetic.counted(architecture(pipe), (128, 128), (None,))
    assert arithmetic.share(plan, 6) == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_each_text_of_a_step_is_forecast_from_its_own_outputs(name: str) -> None:
    """Two calls a step, as guidance takes where it is not in one batch; noise falls from step to step."""
    model, noises = transformer(name), [0.9, 0.7, 0.5, 0.3]
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=noises))
    calls = [call_of(name, noise=noise) for noise in noises]
    text = next(key for key in calls[0] if key == "encoder_hidden_states")
    texts = calls[0][text], -calls[0][text]
    with torch.no_grad():
        dense = [[image_of(model(**call | {text: one})) for one in texts] for call in calls]
        with forecast(pipe, lambda steps: (0, 1)):
            for _ in range(2):  # the second run knows nothing of the first
                ours = [[image_of(model(**call | {text: one})) for one in texts] for call in calls]
                for which in (0, 1):
                    a, b = dense[0][which], dense[1][which]
                    torch.testing.assert_close(ours[1][which], b)
                    torch.testing.assert_close(ours[2][which], b + (b - a))
                    torch.testing.assert_close(ours[3][which], b + 2 * (b - a))
        assert torch.equal(image_of(model(**calls[3])), dense[3][0])
    assert "forward" not in vars(model)


def test_lists_cannot_be_forecast() -> None:
    pipe = SimpleNamespace(transformer=transformer("ZImageTransformer2DModel"), scheduler=None)
    with pytest.raises(ValueError, match="cannot be forecast"), forecast(pipe, lambda steps: (0,)):
        pass


def test_an_early_step_of_a_transformer_takes_the_time_of_a_dense_one(pipe: Any, plan: Plan) -> None:
    arithmetic = Arithmetic.counted(architecture(pipe), (128, 128), (None,))
    times = Times(arithmetic, 1.0, 2.0, {}, ((arithmetic.step(MATCHED), 0.5), (1.0, 2.0)))
    assert times.share(plan, 6) == pytest.approx((1 + 2 + 3 * 0.5) / (1 + 6 * 2))


def test_a_lora_brings_the_pruned_transformer_nearer_to_dense(pipe: Any, tmp_path: Path) -> None:
    plan = Plan(fingerprint(pipe), 3, None, Matched(rate=0.9, level_factors=()), None, 3.0, (128, 128))
    before, dense = snapshot(pipe.transformer), latents(pipe, 3, guidance_scale=3.0)
    training = Training(runs=8, rank=4, learning_rate=5e-3)
    tuned = finetune(pipe, plan, ["a duck", "a castle"], training, tmp_path)
    assert [*snapshot(pipe.transformer)] == [*before]
    with atedm.pruned(pipe, plan):
        without = functional.mse_loss(latents(pipe, 3, guidance_scale=3.0), dense)
    with atedm.pruned(pipe, tuned.file):
        ours = functional.mse_loss(latents(pipe, 3, guidance_scale=3.0), dense)
    assert ours < 0.9 * without
    assert torch.equal(latents(pipe, 3, guidance_scale=3.0), dense)
    names = {name.partition(".0.")[2] for name in targets(pipe.transformer) if ".0." in name}
    assert names >= {"attn.to_q", "attn.add_q_proj", "ff.net.2", "ff_context.net.2"}
    with pytest.raises(ValueError, match="without checkpointing"):
        finetune(pipe, plan, ["a duck"], Training(checkpointing=True), tmp_path)


def test_what_training_a_transformer_holds_is_counted_without_values() -> None:
    needs = training_needs(architecture("sd35-medium"), Training(), torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in architecture("sd35-medium").on_meta().parameters())
    assert needs.weights == 2 * parameters
    assert needs.activations > needs.weights
    with pytest.raises(ValueError, match="without checkpointing"):
        training_needs(architecture("sd35-medium"), Training(checkpointing=True), torch.bfloat16)


def test_a_search_ends_with_a_plan_for_this_model_and_no_other(pipe: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"of": "arithmetic", "steps": 6, "size": (128, 128), "prompts": ["a duck", "a castle"]}
    tuned = atedm.tune(pipe, 0.6, **asked, images=14, out=tmp_path, model="small")
    names = {one.name for one in tuned.tried}
    assert {"fewer steps", "forecast", "matched"} <= names
    assert not any("dpm++" in name or name == "DeepCache" for name in names)
    assert tuned.plan.found["cost"] <= 0.6
    assert all(one.distance <= tuned.plan.found["distance"] + 1e-3 for one in tuned.tried if one.is_whole)
    with atedm.pruned(pipe, tuned.file):
        latents(pipe, tuned.plan.steps)
    with pytest.raises(ValueError, match="for another model: its sample_size is 64, here it is"):
        atedm.apply(transformer("SD3Transformer2DModel"), dataclasses.replace(tuned.plan, cache=None))
    with pytest.raises(ValueError, match="does not say for which"):
        atedm.apply(load_pipeline("tiny", device="cpu"), tuned.plan)
    with pytest.raises(TypeError, match="not compiled"):
        atedm.apply(pipe.transformer, dataclasses.replace(tuned.plan, cache=Cache(2, 1.0, None)))
    with pytest.raises(ValueError, match="DeepCache is for U-Nets"):
        atedm.apply(pipe, dataclasses.replace(tuned.plan, cache=Cache(2)))
    assert not atedm.is_applied(pipe)
