"""A LoRA brings the pruned model nearer to its dense self, goes on where it was killed, and leaves no trace."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import atedm
from atedm.app.models import load_pipeline
from atedm.costs.architectures import architecture
from atedm.hosts.unet_spans import find_spans
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Cache, Plan, read_plan, save_plan
from atedm.tuning.finetune import Training, _one_run, _trainable, finetune
from atedm.tuning.memory import FusedAttention, _held, training_needs
from models import sdxl_pipeline, sdxl_unet, snapshot

PROMPTS = ["a duck", "a castle"]


@pytest.fixture
def pipe() -> Any:
    return sdxl_pipeline()


@pytest.fixture
def plan(pipe: Any) -> Plan:
    return Plan(fingerprint(pipe), 3, method=atedm.Matched(rate=0.8), guidance=3.0)


def latents(pipe: Any, prompt: str = "a frog") -> torch.Tensor:
    noise = torch.Generator("cpu").manual_seed(99)
    found: torch.Tensor = pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=noise,
        output_type="latent",
        width=128,
        height=128,
    ).images
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The model that ships at half of its arithmetic, with a few runs of training."""
    pipe, out = load_pipeline("tiny", device="cpu"), tmp_path_factory.mktemp("trained")
    plan = Plan(fingerprint(pipe), 4, method=atedm.Matched(rate=0.9), guidance=3.0, size=(128, 128))
    return pipe, finetune(pipe, plan, PROMPTS, Training(runs=10, learning_rate=2e-3), out), out


def test_the_pruned_model_comes_nearer_to_dense_on_a_prompt_it_did_not_see(trained: Any) -> None:
    pipe, tuned, _ = trained
    dense = latents(pipe)
    with atedm.pruned(pipe, dataclasses.replace(tuned.plan, lora=None)):
        without = functional.mse_loss(latents(pipe), dense)
    with atedm.pruned(pipe, tuned.file):
        ours = functional.mse_loss(latents(pipe), dense)
    assert ours < 0.85 * without
    assert torch.equal(latents(pipe), dense)


def test_diffusers_loads_it_and_it_is_what_was_trained(trained: Any) -> None:
    pipe, tuned, out = trained
    other = load_pipeline("tiny", device="cpu")
    other.load_lora_weights(out / "lora")
    names = [name for name, _ in other.unet.named_parameters() if "lora_A" in name]
    spans = [block for _, block in find_spans(other.unet).values()]
    assert len(names) == sum(2 + 10 * len(block.transformer_blocks) for block in spans)
    with atedm.pruned(other, tuned.plan.method):
        beside = latents(other)
    with atedm.pruned(pipe, tuned.file):
        within = latents(pipe)
    assert torch.allclose(beside, within, atol=1e-3)


def test_nothing_of_a_training_is_left_in_the_pipeline(pipe: Any, plan: Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, scheduler="dpm++", cache=Cache(2))
    before, dense, scheduler = snapshot(pipe.unet), latents(pipe), pipe.scheduler
    tuned = finetune(pipe, plan, PROMPTS, Training(runs=2, rank=2, checkpointing=True), tmp_path)
    assert pipe.scheduler is scheduler
    assert [*snapshot(pipe.unet)] == [*before]
    assert torch.equal(latents(pipe), dense)
    assert not any(parameter.grad is not None for parameter in pipe.unet.parameters())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    read = read_plan(tuned.file)
    assert (read.lora, read.cache, read.found["lora"]["runs"]) == ("lora", Cache(2), 2)
    assert read.lora_folder == tmp_path / "lora"


def test_gradients_do_not_depend_on_checkpointing(pipe: Any, plan: Plan, tmp_path: Path) -> None:
    losses = [
        finetune(pipe, plan, PROMPTS, Training(runs=3, rank=2, checkpointing=on), tmp_path / str(on)).losses
        for on in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_training_that_was_stopped_goes_on_to_the_same_result(
    pipe: Any, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atedm.tuning.finetune._SAVED_EVERY", 2)
    training = Training(runs=6, rank=2)
    whole = finetune(pipe, plan, PROMPTS, training, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(pipe, plan, PROMPTS, training, tmp_path / "stopped", progress=stop)
    assert not atedm.is_applied(pipe)
    again = finetune(pipe, plan, PROMPTS, training, tmp_path / "stopped")
    assert again.losses == whole.losses
    files = [next((tmp_path / name / "lora").glob("*.safetensors")).read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_a_training_that_was_killed_goes_on(plan: Plan, tmp_path: Path) -> None:
    small = sdxl_pipeline(unet=sdxl_unet(layers_per_block=2))
    small.save_pretrained(tmp_path / "model")
    save_plan(Plan(fingerprint(small), 1, method=atedm.Matched(rate=0.9), guidance=3.0), tmp_path / "plan.json")
    command = [
        *(sys.executable, "-m", "atedm", "finetune", "model", "--plan", "plan.json", "--runs", "12", "--rank", "2"),
        *("--device", "cpu", "--out", "killed"),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while (
        not (tmp_path / "killed" / "state.safetensors").exists() and time.monotonic() < until and process.poll() is None
    ):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "killed/plan.json" in done.stdout.replace(os.sep, "/")
    assert json.loads((tmp_path / "killed" / "plan.json").read_text())["lora"] == "lora"


@pytest.mark.skipif("ATEDM_PROCESSES" not in os.environ, reason="starts two processes; ATEDM_PROCESSES=1, as do nights")
def test_two_processes_step_by_the_mean_of_their_gradients(tmp_path: Path) -> None:
    small = sdxl_pipeline(unet=sdxl_unet(layers_per_block=2))
    small.save_pretrained(tmp_path / "model")
    plan = Plan(fingerprint(small), 1, method=atedm.Matched(rate=0.5), guidance=3.0)
    save_plan(plan, tmp_path / "plan.json")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", "0", "-m", "atedm", "finetune", "model", "--plan", "plan.json", "--runs", "1"),
        *("--rank", "2", "--prompts", "prompts.txt", "--device", "cpu", "--out", "two"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    state = load_file(tmp_path / "two" / "state.safetensors")
    with _trainable(small.unet, Training(rank=2)) as parameters:
        for number, prompt in enumerate(PROMPTS):
            _one_run(small, small.unet, plan, prompt, number)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= 2
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for number, parameter in enumerate(parameters):  # AdamW's first moment begins as a tenth of the gradient
            moment = state[f"optimizer.{number}.exp_avg"]
            torch.testing.assert_close(moment, 0.1 * parameter.grad, rtol=1e-3, atol=1e-7)


def test_a_plan_with_a_lora_is_refused_on_other_weights(pipe: Any, plan: Plan, tmp_path: Path) -> None:
    tuned = finetune(pipe, plan, PROMPTS, Training(runs=1, rank=2), tmp_path)
    other = sdxl_pipeline(unet=sdxl_unet(seed=1))
    with pytest.raises(ValueError, match="was found for other weights"):
        atedm.apply(other, tuned.file)
    next((tmp_path / "lora").glob("*.safetensors")).write_bytes(b"no LoRA")
    before = snapshot(pipe.unet)
    with pytest.raises(ValueError, match="cannot load the LoRA at"):
        atedm.apply(pipe, tuned.file)
    assert snapshot(pipe.unet) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": None}, "prunes nothing"),
        ({"model": {"pipeline": "StableDiffusionXLPipeline", "unet": "Other"}}, "this plan is for another model"),
    ],
)
def test_a_plan_that_cannot_be_trained_for_is_refused(
    pipe: Any, plan: Plan, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        finetune(pipe, dataclasses.replace(plan, **changes), PROMPTS, out=tmp_path)


def test_other_settings_in_the_same_folder_are_refused(pipe: Any, plan: Plan, tmp_path: Path) -> None:
    finetune(pipe, plan, PROMPTS, Training(runs=1, rank=2), tmp_path)
    with pytest.raises(ValueError, match="holds a training of another training"):
        finetune(pipe, plan, PROMPTS, Training(runs=1, rank=3), tmp_path)
    with pytest.raises(ValueError, match="there are no prompts"):
        finetune(pipe, plan, [], Training(runs=1, rank=2), tmp_path)


@pytest.mark.parametrize("changes", [{"runs": 0}, {"rank": 0}, {"learning_rate": 0}, {"learning_rate": 2}])
def test_training_checks_its_values(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Training(**changes)


def test_what_a_step_holds_is_counted_without_values() -> None:
    arch = architecture("tiny")
    with FusedAttention():
        on_meta = _held(arch.on_meta().train(), arch.call((64, 64), 2))
    here = arch.on_meta().train().to_empty(device="cpu")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which holds the sums of its rows besides
        assert _held(here, arch.call((64, 64), 2, device="cpu")) == pytest.approx(on_meta, rel=0.03)
    assert on_meta[0] > on_meta[1] > 0


def test_checkpointing_and_16_bits_take_less() -> None:
    arch = architecture("tiny")
    whole, again = (training_needs(arch, Training(checkpointing=on), torch.float32, (128, 128)) for on in (False, True))
    assert again.activations < 0.3 * whole.activations
    assert training_needs(arch, Training(rank=8), torch.bfloat16).lora * 2 == whole.lora
    assert training_needs(arch, Training(), torch.bfloat16).weights * 2 == whole.weights
